"""What a run is: four frozen configs. A mistake in one is a sentence that says what to do."""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    field_validator,
    model_validator,
)

from distsampler import option_names, presets
from distsampler.errors import ConfigError
from distsampler.frozen import NUMBER, Config, Count, NamedField
from distsampler.probes import ProbeConfig, check_names
from distsampler.redaction import redacted
from distsampler.references import Mask, patterns_or_masks

HOP_EVERY = 100  # steps, where not given
AUTO_GATE = {"every": 400, "relative_error": 0.05}  # with draws="auto", where not given

Positive = Annotated[float, Field(gt=0)]
_Auto = Annotated[Literal["auto"], Tag("auto")]
_AUTO = Discriminator(lambda value: "auto" if value == "auto" else NUMBER)
CountOrAuto = Annotated[Annotated[int, Field(ge=1), Tag(NUMBER)] | _Auto, _AUTO]
_Environment = Annotated[
    dict[str, Any], PlainSerializer(lambda environment: redacted(environment, named=True))
]
_MaskField = Annotated[Mask, PlainValidator(Mask.of), PlainSerializer(str)]


class ConfigPart(Config):
    """Part of a run's config, or all of it."""

    part: ClassVar[str]  # its field in the run's config; "" for that itself

    @classmethod
    def unknown(cls, name: str) -> str:
        """Return a sentence for an option that the part does not have."""
        return unknown_option(cls.part, name)


class SamplerConfig(ConfigPart):
    """A sampler by name, and its options.

    Options are declared once, in the signature of the sampler's class, and checked against it
    before anything starts.

    Args:
        name: a name in ``distsampler.optim.SAMPLERS``, or ``"package.module:Class"``.
        correct_heat: inject less noise to make up for the noise of minibatches (SGLD, LMSGLD,
            RMSPropSGLD): the run measures the gradients' variance at w* for it.
        **options: any option of that class, for example ``lr``, ``localization``, ``nbeta``. By
            default ``nbeta`` is n / log n, ``freeze_after`` the end of burn-in, ``batch_size`` the
            run's.

    Example:
        >>> SamplerConfig(name="sgld", lr=1e-4, localization=100.0).options
        {'lr': 0.0001, 'localization': 100.0}
    """

    part = "sampler"
    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    name: str = "sgld"
    correct_heat: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler's class, as given."""
        return dict(self.model_extra or {})


class GateConfig(ConfigPart):
    """When a run counts as converged.

    Args:
        rhat: upper bound for the rank-normalised split R-hat of every gated variable, and for the
            nested R-hat where starts are dispersed.
        ess: lower bound for their bulk and tail effective sample size.
        every: draws until the first gate round; each further one comes 1.5 times as late, and the
            run stops at the first that finds it converged. None: all draws are made, and the
            verdict is given at the end; with draws="auto": 400.
        relative_error: largest standard error of the LLC, relative to it; None: any; with
            draws="auto": 0.05.
    """

    part = "gate"
    rhat: Annotated[float, Field(gt=1.0)] = 1.01
    ess: Positive = 400.0
    every: Count | None = None
    relative_error: Positive | None = None


class PlacementConfig(ConfigPart):
    """Where chains run. Nothing here changes a bit of the trace.

    Args:
        gpus_per_chain: GPUs per chain, fractions allowed; None: 1 where the cluster has GPUs, else
            0.
        cpus_per_chain: CPUs per chain.
        chains_per_actor: chains that take turns in one process; a pack is never parted.
        address: the Ray cluster to join; None: RAY_ADDRESS, or a running local Ray, or a new one.
        label_selector: Ray node labels that actors need.
        runtime_env: Ray runtime environment of the actors; local folders in ``working_dir`` and
            ``py_modules`` are sent to the cluster when it is joined. Secrets in it are not kept.
        autoscale: wait up to ``start_timeout`` for the cluster to start nodes for actors that no
            node can hold now, where otherwise that is an error. Needs ``gpus_per_chain``.
        start_timeout: seconds in which an actor must start, and the first try of model, loss and
            data must end; the first work of an actor may take six times as long, or, where others
            have done one, 20 times as long as theirs.
        answer_timeout: seconds in which an actor that has long reported nothing must say that it
            lives, or it counts as lost. It counts as hung where a block takes longer than this and
            20 times as long as the slowest one before; its chain continues elsewhere.
        block: draws that a chain makes between two reports; None: as many as take about two
            seconds, more where over 200 places report.
    """

    part = "placement"
    gpus_per_chain: Annotated[float, Field(ge=0)] | None = None
    cpus_per_chain: Annotated[float, Field(ge=0)] = 1.0
    chains_per_actor: Count = 1
    address: str | None = None
    label_selector: dict[str, str] | None = None
    runtime_env: _Environment | None = None
    autoscale: bool = False
    start_timeout: Positive = 300.0
    answer_timeout: Positive = 60.0
    block: Count | None = None

    @model_validator(mode="after")
    def _can_be_asked_for(self) -> Self:
        if self.autoscale and self.gpus_per_chain is None:
            raise ValueError(
                "autoscale needs gpus_per_chain, for example 1, or 0 for CPUs only: what nodes "
                "that are not there yet will have is not known"
            )
        return self


class RunConfig(ConfigPart):
    """All that a run depends on, except model, data and loss.

    What "auto" means for draws and burn-in, in numbers, is worked out by ``schedule.Schedule``.

    Args:
        sampler: the sampler and its options.
        chains: number of chains.
        draws: draws per chain after burn-in; fewer, if the gate stops the run. "auto": until a
            gate round finds the run converged and its error small enough.
        max_draws: most draws per chain, for draws="auto".
        burn_in: draws per chain before those; they go to the warm-up groups, never to the
            posterior. "auto": as long as the trace drifts, at most half, chosen again at each gate
            round; ``draws`` then counts them too. The default with draws="auto".
        thin: steps per draw.
        batch_size: examples per step.
        batches: minibatches drawn with "replacement", or by one permutation per "epoch".
        data_mode: "replicate": every chain draws its batches from all data. "hop": the data are cut
            into shards, and a chain draws from one for ``hop_every`` steps, then from another.
            "pinned", where chains never change their shard, is an error that gives its bias.
        shards: number of shards, for data_mode="hop"; not needed where data is a list of shards.
        hop_every: steps that a chain spends on a shard; 100 with data_mode="hop".
        seed: seed of all that is random: chain c is a function of (seed, c).
        restrict_to: names or regular expressions of the parameters that move; names of components,
            as ``"l0h3"`` or ``"l0h3+l1.mlp"``, that ``ds.components(model)`` lists; or boolean
            masks by name (tensors, arrays or nested lists; True moves, a parameter not named does
            not); None: all that require a gradient.
        components: where a transformer of an unknown architecture has its parts, for such names;
            see ``models.components.architectures.Architecture``.
        init: "anchor": all chains start at w*. "dispersed": the odd ones start away from it, so
            that the two kinds approach the LLC from both sides; see ``chains.dispersed_start``.
        init_radius: |w - w*| where odd chains start, in weight units; None: chosen by the loss.
        n: what n, and with it nbeta = n / log n, counts. "examples": L_n is the mean over examples.
            "tokens": of a language model; L_n is the mean over all tokens that count, and the loss
            returns one value per token, as ``lm.token_losses``.
        mode: the model's mode while sampling. Where an example's loss depends on chance or on its
            batch (dropout, batch norm in mode "train"), each draw costs a second pass, at w*.
        probe: number of fixed examples whose losses the gate reads.
        observables: your own measurements, by name: ``fn(model, batch)`` on the probe at every
            draw, or ``fn(model, batch, losses)``, with the probe's losses there; a tensor of one
            shape. In YAML "module:callable" or "path/to/file.py:callable". Up to 64 numbers go to
            the posterior, larger tensors to ``Run.wide``.
        probes: how the named probes are measured whose data ``sample(..., probes=...)`` is given.
        save_losses: keep the probe's per-example losses at every draw, for ``Run.losses``.
        save_weights_every: keep the parameters that move at every k-th draw, counted from the
            chain's start, for ``Run.weights``.
        device: where chains run; "auto": on the GPU they were given, else on the CPU.
        threads: CPU threads per chain.
        deterministic: ask torch for deterministic algorithms.
        precision: "bf16": the model's forward and backward pass run under autocast, at w* too.
            Weights, noise and curvature stay in their own precision.
        compile: ``torch.compile`` the loss, or the recorded gradients of a pack.
        microbatch: examples that go through the model at once, where a batch takes too much memory;
            gradients are summed. In mode "train" batch norm sees one microbatch.
        watch: measure the curvature along each chain, often at first, then less and less, and
            predict the bias of its steps from it.
        min_chains: the run fails when fewer chains are left.
        max_seconds: wall-clock seconds after which the run stops cleanly.
        gate: when the run counts as converged.
        placement: where the chains run.
        commit_seconds: seconds between two commits; more where a commit takes over half a second.
        fsync: make each commit survive a power loss, not only the death of any process.
        max_state_mb: size in MB from which a chain's state goes from the actor to the store.
        divergence_factor: a chain is retired when nbeta times the excess loss on the probe exceeds
            d/2, the value of a regular model with d parameters, by this factor; None: never.
        pack: chains that advance together, their gradients in one call: for models so small that a
            step is mostly overhead. Another number gives the same law, and other last bits. "auto":
            the fastest, measured when the run starts.

    Example:
        >>> RunConfig(chains=2, sampler=SamplerConfig(lr=1e-4)).sampler.options
        {'lr': 0.0001}
    """

    part = ""
    sampler: SamplerConfig = SamplerConfig()
    chains: Count = 4
    draws: CountOrAuto = 1000
    max_draws: Count | None = None
    burn_in: Annotated[Annotated[int, Field(ge=0), Tag(NUMBER)] | _Auto, _AUTO] = 200
    thin: Count = 10
    batch_size: Count = 64
    batches: Literal["replacement", "epoch"] = "replacement"
    data_mode: Literal["replicate", "hop", "pinned"] = "replicate"
    shards: Count | None = None
    hop_every: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    restrict_to: tuple[str, ...] | dict[str, _MaskField] | None = None
    components: dict[str, str | int] | None = None
    init: Literal["anchor", "dispersed"] = "anchor"
    init_radius: Positive | None = None
    n: Literal["examples", "tokens"] = "examples"
    mode: Literal["eval", "train"] = "eval"
    probe: Annotated[int, Field(ge=8)] = 256
    observables: dict[str, NamedField] = Field(default_factory=dict)
    probes: dict[str, ProbeConfig] = Field(default_factory=dict)
    save_losses: bool = False
    save_weights_every: Count | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count = 1
    deterministic: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    microbatch: Count | None = None
    watch: bool = True
    min_chains: Count = 2
    max_seconds: Positive | None = None
    gate: GateConfig = GateConfig()
    placement: PlacementConfig = PlacementConfig()
    commit_seconds: Positive = 5.0
    fsync: bool = False
    max_state_mb: Annotated[float, Field(ge=0)] = 64.0
    divergence_factor: Annotated[float, Field(gt=1)] | None = 100.0
    pack: CountOrAuto = 1

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401 (fields)
        """Return the config of a published setting, with changes.

        Args:
            name: a name in ``presets.PRESETS``.
            **changes: fields; those of the sampler are merged: ``sampler={"lr": 1e-4}``, as are
                those that a ``SamplerConfig`` was given.

        Example:
            >>> RunConfig.from_preset("pythia-70m-2510.12077", seed=1).draws
            100
        """
        parts = {k: v.explicit if isinstance(v, ConfigPart) else v for k, v in changes.items()}
        return cls.of(presets.named(name).values).merged(parts)

    @classmethod
    def of(cls, config: object) -> Self:
        """Return what is given as a config: one, its fields by name, or None, the defaults."""
        match config:
            case None:
                return cls()
            case cls():
                return config
            case Mapping() if all(isinstance(name, str) for name in config):
                return cls(
                    **{k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
                )
            case ConfigPart() if config.part:
                hint = f"write RunConfig({config.part}=...)"
            case _:
                hint = "a calibration has one, its .config; a YAML file is run by 'distsampler run'"
        raise ConfigError(
            "the config must be a RunConfig, or a dict of its fields, got "
            f"{type(config).__name__}: {hint}"
        )

    @field_validator("restrict_to", mode="before")
    @classmethod
    def _patterns_or_masks(cls, value: object) -> object:
        return patterns_or_masks(value)

    @field_validator("probes", mode="before")
    @classmethod
    def _names_of_probes(cls, value: object) -> object:
        return check_names(value)

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: object) -> object:
        """Add what follows from other fields and was not given: a run does what its config says."""
        if not isinstance(data, dict):
            return data
        if data.get("chains") == 1:  # allowed; its verdict will be UNDETERMINED
            data = {"min_chains": 1, **data}
        if data.get("data_mode") == "hop" and not data.get("hop_every"):
            data = {**data, "hop_every": HOP_EVERY}
        if data.get("draws") != "auto":
            return data
        gate = data.get("gate", {})
        gate = gate.model_dump() if isinstance(gate, GateConfig) else gate
        if isinstance(gate, dict):
            gate = AUTO_GATE | {k: v for k, v in gate.items() if v is not None}
        return {"burn_in": "auto", **data, "gate": gate}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        for contradiction in self._contradictions():
            raise ValueError(contradiction)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Say of fields that cannot stand together why, and what to do."""
        hop, auto = self.data_mode == "hop", self.draws == "auto"
        dispersed = self.init == "dispersed"
        of_hop = [name for name in ("shards", "hop_every") if getattr(self, name) is not None]
        if self.data_mode == "replicate" and of_hop:
            yield f"{of_hop[0]} belongs to data_mode='hop', and it is 'replicate'"
        if hop and self.batches == "epoch":
            yield (
                "batches='epoch' walks through all data, and data_mode='hop' sits on one shard: "
                "use batches='replacement'"
            )
        if hop and self.sampler.correct_heat:
            yield (
                "sampler.correct_heat needs batches from all data at w*, and data_mode='hop' holds "
                "one shard at a time: leave it out"
            )
        if self.min_chains > self.chains:
            yield f"min_chains must be at most chains={self.chains}: {self.min_chains}"
        if auto and self.max_draws is None:
            yield (
                "draws='auto' needs max_draws, the most draws that a chain may make: for example "
                "max_draws=20000"
            )
        if not auto and self.max_draws is not None:
            yield (
                f"max_draws is the budget of draws='auto', and draws is {self.draws}: leave out "
                "one of them"
            )
        if dispersed and self.chains < 2:
            yield (
                f"init='dispersed' needs at least 2 chains, got {self.chains}: the odd ones start "
                "away from w*"
            )
        if not dispersed and self.init_radius is not None:
            yield (
                f"init_radius={self.init_radius:g} belongs to init='dispersed', and init is "
                f"{self.init!r}: set that, or leave it out"
            )

    @property
    def together(self) -> int:
        """Chains per pack; 1 while "auto" has not been settled."""
        return 1 if self.pack == "auto" else min(self.pack, self.chains)

    @property
    def packs(self) -> tuple[range, ...]:
        """The chains of each pack; the last may have fewer."""
        size, chains = self.together, self.chains
        return tuple(range(first, min(first + size, chains)) for first in range(0, chains, size))


def unknown_option(part: str, name: str, known: Collection[str] = (), what: str = "option") -> str:
    """Return a sentence for an option that does not exist: what was meant, and where it belongs.

    Args:
        part: "" for the run's, "sampler", "gate", "placement".
        name: the option.
        known: the options of the part, where they are not those of its config alone.
        what: what the option was meant to be.
    """
    options: dict[str, Collection[str]] = {
        "": RunConfig.model_fields,
        "sampler": (*SamplerConfig.model_fields, *option_names.SAMPLER_OPTIONS),
        "gate": GateConfig.model_fields,
        "placement": PlacementConfig.model_fields,
    }
    return option_names.unknown_option(name, part, options | ({part: known} if known else {}), what)
