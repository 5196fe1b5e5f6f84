"""The driver: takes events from the pool, lets ``transition`` decide, performs what it says.

Only the driver commits, so a draw exists exactly once however often something died.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import numpy as np

from distsampler.analysis import bias
from distsampler.analysis.verdict import Verdict
from distsampler.chains import anchor_pass, hop
from distsampler.chains.worker import AnchorPass, Work
from distsampler.draws import AtAnchor, DrawBlock, StateFile
from distsampler.errors import DistsamplerError, StoreError
from distsampler.execution.pool import ChainPool, PlaceLost, PoolEvent
from distsampler.execution.progress import Observer, Progress
from distsampler.execution.run_state import (
    Action,
    CommitNow,
    Committed,
    Event,
    Judge,
    Judged,
    Keep,
    Note,
    Phase,
    RecordAnchor,
    Refused,
    Restart,
    Retire,
    RunSetup,
    State,
    Stop,
    Submit,
)
from distsampler.execution.transition import begin, transition
from distsampler.models.replica import ChainSpec
from distsampler.schedule import Schedule
from distsampler.store.events import Lost, Retired, RunEvent, Started, StepTooLarge
from distsampler.store.trace import Trace

WAIT_SECONDS = 0.2
COMMIT_SHARE = 10.0  # of its time at most about one part in so many goes into long commits
SHORT_COMMIT = 0.5  # seconds: those that take no longer are made as often as asked
SHOW_SHARE = 20.0  # of the driver's time at most one part in so many goes into showing progress


class Driver:
    """The loop: performs what ``transition`` decides, and tells it what came of it.

    Args:
        spec: the recipe of every chain.
        pool: where work is done; started and stopped here.
        trace: where draws are committed.
        judge: the verdict on the first draws after burn-in.
        observer: of the progress.
        stopped: a reason to stop, asked for several times a second.
    """

    def __init__(
        self,
        spec: ChainSpec,
        pool: ChainPool,
        trace: Trace,
        judge: Callable[[int], Verdict],
        observer: Observer,
        stopped: Callable[[], str | None],
    ) -> None:
        self._spec, self._pool, self._trace = spec, pool, trace
        self._judge, self._observer, self._stopped = judge, observer, stopped
        self._at_anchor = trace.constants.at_anchor()
        self._pending: list[DrawBlock] = []
        self._states: dict[int, bytes | StateFile] = {}
        self._events: deque[Event] = deque()
        self._too_large: set[int] = set()
        self._restarts: list[tuple[float, int, int]] = []
        self._incarnations: dict[int, int] = {}  # of places that were started again
        self._last_commit = time.monotonic()
        self._commit_took = 0.0
        self._shown: Phase | None = None
        self._show_again = 0.0
        self._schedule = Schedule.of(spec.config)
        self._received = trace.restart_points()
        burn_in, total = self._schedule.provisional_burn_in, self._schedule.total
        self._progress = Progress(self._received, burn_in, total - burn_in, spec.nbeta)

    def run(self, places: tuple[int, ...]) -> State:
        """Runs to the end.

        Args:
            places: that the pool has begun to bring up.

        Returns:
            The last state; its phase is FINISHED or FAILED.
        """
        config = self._spec.config
        setup = RunSetup(
            self._schedule,
            config.min_chains,
            config.placement.block,
            anchor_pass.parts_of(self._spec, len(places)),
            config.together,
        )
        retired = frozenset(self._trace.manifest.retired)
        anchored = self._at_anchor is not None
        committed = self._trace.committed
        state = begin(setup, places, committed, retired, anchored, self._received)
        self._see_anchor()
        try:
            while not state.over:
                for event in self._next_events(state):
                    state, actions = transition(state, event)
                    for action in actions:
                        self._perform(action)
                if not state.over:  # its end is shown when all is committed
                    self._show(state)
        except StoreError:
            raise  # nothing more can be written
        except BaseException:
            self._commit()
            raise
        self._commit()
        self._show(state)
        return state

    def _show(self, state: State) -> None:
        """Tells the observer how the run goes: a new phase at once, the rest now and then."""
        began = time.monotonic()
        if state.phase is self._shown and began < self._show_again:
            return
        made = {}
        if state.phase is Phase.ANCHORING:
            made = anchor_pass.progress(state.setup.parts, state.parts)
        committed = self._trace.committed
        self._observer.show(
            self._progress.snapshot(str(state.phase), state.retired, committed, made)
        )
        ended = time.monotonic()
        self._shown, self._show_again = state.phase, ended + SHOW_SHARE * (ended - began)

    def _next_events(self, state: State) -> list[Event]:
        """What the loop itself has to say, else what the pool reports."""
        self._bring_up()
        reason = self._stopped()
        if reason is not None and state.phase is not Phase.DRAINING:
            self._events.append(Stop(reason))
        pause = max(
            self._spec.config.commit_seconds, COMMIT_SHARE * (self._commit_took - SHORT_COMMIT)
        )
        if time.monotonic() - self._last_commit > pause:
            self._commit()
        if not self._events:
            self._events.extend(self._reported())
        events = list(self._events)
        self._events.clear()
        return events

    def _reported(self) -> list[PoolEvent]:
        """What the pool reports, with the incarnation of each place."""
        return [
            replace(event, incarnation=self._incarnations.get(event.place, 1))
            for event in self._pool.wait(WAIT_SECONDS)
        ]

    def _perform(self, action: Action) -> None:
        match action:
            case Submit(place, work):
                self._pool.submit(place, self._filled(work))
            case Restart(place, incarnation, losses):
                delay = random.uniform(2.0, 3.0 + 0.5 * min(losses, 4))
                self._restarts.append((time.monotonic() + delay, place, incarnation))
            case Keep(block):
                self._pending.append(block)
                self._states[block.chain] = block.state
                self._progress.add(block)
                self._see_step(block)
            case CommitNow():
                self._commit()
            case RecordAnchor(parts):
                self._record(parts)
            case Judge(draws):
                verdict = self._judge(draws)
                self._progress.judged(verdict)
                self._events.append(Judged(verdict))
            case Retire(chain, reason):
                self._trace.log(Retired(chain, reason))
                self._trace.retire(chain, reason)
            case Note(event):
                self._note(event)
            case _:
                assert_never(action)

    def _see_step(self, block: DrawBlock) -> None:
        """Notes, once a chain, that its step is too large for the curvature it has met."""
        if "curvature" not in block.values or block.chain in self._too_large:
            return
        curvature = np.asarray(block.values["curvature"], np.float64)
        reason = bias.too_large(curvature, self._spec.facts)
        if reason is not None:
            self._too_large.add(block.chain)
            self._trace.log(StepTooLarge(block.chain, reason))

    def _note(self, event: RunEvent) -> None:
        if isinstance(event, Started):
            self._trace.record_device(str(event.info["device"]))
        elif isinstance(event, Lost):
            for chain in event.chains or ():
                self._progress.lost(chain)
        self._trace.log(event)

    def _filled(self, work: Work) -> Work:
        """The work with all that its place needs."""
        if isinstance(work, AnchorPass):
            return work
        states = tuple(
            self._states.get(chain) or self._trace.state(chain, work.first_draw)
            for chain in (work.chains if work.with_states else ())
        )
        return replace(work, at_anchor=self._at_anchor, states=states, files=self._trace.files)

    def _record(self, parts: tuple[anchor_pass.AnchorPart, ...]) -> None:
        self._at_anchor = anchor_pass.reduce(parts, self._spec)
        self._trace.record_facts(self._spec.facts, self._at_anchor)
        self._see_anchor()

    def _see_anchor(self) -> None:
        """Refuses to sample where w* has no loss, or hopping would bring too much of an error."""
        if self._at_anchor is None:
            return
        reason = _not_finite(self._at_anchor) or hop.refusal(self._at_anchor.hop_bias, self._spec)
        if reason is not None:
            self._events.append(Refused(reason))

    def _commit(self) -> None:
        self._last_commit = time.monotonic()
        if self._pending:
            self._trace.commit(self._pending)
            self._commit_took = time.monotonic() - self._last_commit
            self._pending.clear()
            self._events.append(Committed(self._trace.committed))

    def _bring_up(self) -> None:
        now = time.monotonic()
        for entry in [entry for entry in self._restarts if entry[0] <= now]:
            self._restarts.remove(entry)
            _, place, self._incarnations[place] = entry
            try:
                self._pool.start(self._spec, [place])
            except DistsamplerError as error:
                self._events.append(
                    PlaceLost(place, str(error), "fatal", self._incarnations[place])
                )


def _not_finite(found: AtAnchor) -> str | None:
    """Why no excess over the loss at w* can be told; None if it can."""
    losses = found.losses
    if losses is not None and not np.isfinite(losses).all():
        bad = np.flatnonzero(~np.isfinite(losses))
        first = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        got = f"{len(bad)} of {len(losses)} examples give {losses[bad[0]]} (rows {first})"
    elif not np.isfinite([found.init_loss, *found.probe_losses]).all():
        got = f"its mean over all data is {found.init_loss}"
    else:
        return None
    return (
        f"the loss at w* must be finite on every example, but {got}: leave such examples out or "
        "mend them, or give a model whose loss is finite there"
    )
