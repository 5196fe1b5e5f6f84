import distsampler as ds
from distsampler.schedule import Schedule


def test_gate_rounds_are_spaced_geometrically_and_end_at_the_budget() -> None:
    config = ds.RunConfig(draws=1000, gate=ds.GateConfig(every=200))
    assert Schedule.of(config).gate_rounds == (200, 300, 450, 675, 1000)
    assert Schedule.of(ds.RunConfig(draws=1000)).gate_rounds == (1000,)


def test_a_given_burn_in_comes_before_what_is_counted() -> None:
    given = Schedule.of(ds.RunConfig(draws=1000, burn_in=100, gate=ds.GateConfig(every=400)))
    assert (given.counted_from, given.budget, given.total) == (100, 1000, 1100)
    assert given.round_ends == (500, 700, 1000, 1100)
    assert given.provisional_burn_in == given.adapting == 100


def test_a_chosen_burn_in_is_part_of_what_is_counted() -> None:
    chosen = Schedule.of(ds.RunConfig(draws="auto", max_draws=1000))
    assert chosen == Schedule(None, (400, 600, 900, 1000))
    assert (chosen.counted_from, chosen.budget, chosen.total) == (0, 1000, 1000)
    assert chosen.round_ends == chosen.gate_rounds
    assert (chosen.provisional_burn_in, chosen.adapting) == (200, 100)
