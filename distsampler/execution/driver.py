"""The driver: takes events from the pool, lets ``transition`` decide, and does what it says.

Only the driver commits, so a draw exists exactly once however often something died.
"""

import logging
import random
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import numpy as np

from distsampler.analysis import bias
from distsampler.analysis.verdict import Verdict
from distsampler.chains import anchor_pass, hop
from distsampler.chains.worker import Advance, Work
from distsampler.draws import CURVATURE, AtAnchor, DrawBlock, StateFile
from distsampler.errors import DistsamplerError, StepTooLargeWarning, StoreError
from distsampler.execution.deadlines import Deadlines
from distsampler.execution.pool import ChainPool, LocatesWork, PlaceLost, PoolEvent
from distsampler.execution.progress import Observer, Progress
from distsampler.execution.run_state import (
    Action,
    CommitNow,
    Committed,
    Event,
    Judge,
    Judged,
    Keep,
    Phase,
    RecordAnchor,
    Refused,
    Restart,
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

log = logging.getLogger(__name__)
WAIT_SECONDS = 0.2
COMMIT_SHARE = 10.0  # long commits take at most about this part of the driver's time
SHORT_COMMIT = 0.5  # seconds: commits that take no longer are made as often as asked
SHOW_SHARE = 20.0  # showing the progress takes at most this part of the driver's time


class Driver:
    """The loop: performs what ``transition`` decides, and reports to it what came of that.

    Args:
        spec: the recipe of every chain.
        pool: where work is done; its first places have been started.
        trace: where draws are committed.
        judge: gives the verdict on the first counted draws; see ``Schedule``.
        observer: shows the progress.
        stopped: gives a reason to stop, if there is one; called several times a second.
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
        self._schedule, self._at_anchor = Schedule.of(spec.config), trace.constants.at_anchor()
        self._received = trace.restart_points()
        burn_in, total = self._schedule.provisional_burn_in, self._schedule.total
        self._progress = Progress(self._received, burn_in, total - burn_in, spec.nbeta)
        self._events: deque[Event] = deque()
        self._deadlines = Deadlines(spec.config)
        self._pending: list[DrawBlock] = []
        self._states: dict[int, bytes | StateFile] = {}  # the newest of each chain
        self._too_large: set[int] = set()  # chains of which it is logged
        self._restarts: dict[int, tuple[float, int]] = {}  # place -> when, which incarnation
        self._incarnations: dict[int, int] = {}  # of places that were started again
        self._last_commit, self._commit_took = time.monotonic(), 0.0
        self._said = set[int]()  # places of which it is logged that they are waited for
        self._shown: Phase | None = None
        self._show_again = 0.0

    def run(self, places: tuple[int, ...]) -> State:
        """Run to the end.

        Args:
            places: numbers of the places that the pool has begun to start.

        Returns:
            The last state; its phase is FINISHED or FAILED.
        """
        state = self._begin(places)
        self._check_anchor()
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

    def _begin(self, places: tuple[int, ...]) -> State:
        config, trace = self._spec.config, self._trace
        parts = anchor_pass.parts_of(self._spec, len(places))
        block, together = config.placement.block, config.together
        return begin(
            RunSetup(self._schedule, config.min_chains, block, parts, together),
            places,
            trace.committed,
            frozenset(trace.manifest.retired),
            anchored=self._at_anchor is not None,
            received=self._received,
        )

    def _show(self, state: State) -> None:
        """Show the progress: a new phase at once, the rest now and then."""
        began = time.monotonic()
        if state.phase is self._shown and began < self._show_again:
            return
        made = {}
        if state.phase is Phase.ANCHORING:
            made = anchor_pass.progress(state.setup.parts, state.parts)
        phase, committed = str(state.phase), self._trace.committed
        waiting = tuple(self._waiting(state).values())
        self._observer(self._progress.snapshot(phase, state.retired, committed, made, waiting))
        ended = time.monotonic()
        self._shown, self._show_again = state.phase, ended + SHOW_SHARE * (ended - began)

    def _next_events(self, state: State) -> list[Event]:
        """What the driver itself reports, else what the pool does."""
        self._restart()
        reason = self._stopped()
        if reason is not None and state.phase is not Phase.DRAINING:
            self._events.append(Stop(reason))
        pause = COMMIT_SHARE * (self._commit_took - SHORT_COMMIT)
        if time.monotonic() - self._last_commit > max(self._spec.config.commit_seconds, pause):
            self._commit()
        if not self._events:
            self._events.extend(map(self._numbered, self._from_places(state)))
        events = list(self._events)
        self._events.clear()
        return events

    def _from_places(self, state: State) -> list[PoolEvent]:
        """What the pool reports, and the places that have been silent for too long."""
        events = list(self._pool.wait(WAIT_SECONDS))
        self._deadlines.tick(time.monotonic(), state.phase)
        for event in events:
            self._deadlines.heard(event)
        late = self._deadlines.overdue(state.hung)
        for loss in late:
            log.warning("%s: it is given up", loss.reason + self._where(loss.place))
        return [*events, *(replace(e, reason=e.reason + self._where(e.place)) for e in late)]

    def _where(self, place: int) -> str:
        """The line of code that a place is at, for the end of a sentence."""
        line = self._pool.where(place) if isinstance(self._pool, LocatesWork) else ""
        return f", at {line}" if line else ""

    def _waiting(self, state: State) -> dict[int, str]:
        """What is waited for longer than usual, by place; it is logged once."""
        waiting = self._deadlines.waiting(state.hung)
        for place in waiting.keys() - self._said:
            log.warning("%s", waiting[place] + self._where(place))
        self._said = set(waiting)
        return waiting

    def _numbered(self, event: PoolEvent) -> PoolEvent:
        """A pool's event with the incarnation of its place, of which the pool does not know."""
        return replace(event, incarnation=self._incarnations.get(event.place, 1))

    def _perform(self, action: Action) -> None:
        match action:
            case Submit(place, work):
                self._pool.submit(place, self._completed(work))
                self._deadlines.given(place, work)
            case Restart(place, incarnation, losses):
                delay = random.uniform(2.0, 3.0 + 0.5 * min(losses, 4))
                self._restarts[place] = (time.monotonic() + delay, incarnation)
            case Keep(block):
                self._pending.append(block)
                self._states[block.chain] = block.state
                self._progress.add(block)
                self._check_step(block)
            case CommitNow():
                self._commit()
            case RecordAnchor(parts):
                self._at_anchor = anchor_pass.reduce(parts, self._spec)
                self._trace.record_facts(self._spec.facts, self._at_anchor)
                self._check_anchor()
            case Judge(draws):
                verdict = self._judge(draws)
                self._progress.judged(verdict)
                self._events.append(Judged(verdict))
            case RunEvent():
                self._log(action)
            case _:
                assert_never(action)

    def _completed(self, work: Work) -> Work:
        """The work with all that its place needs."""
        if not isinstance(work, Advance):
            return work
        states = tuple(
            self._states.get(chain) or self._trace.state(chain, work.first_draw)
            for chain in (work.chains if work.with_states else ())
        )
        return replace(work, at_anchor=self._at_anchor, states=states, files=self._trace.files)

    def _log(self, event: RunEvent) -> None:
        if isinstance(event, Started):
            self._trace.record_device(str(event.info["device"]))
        self._trace.log(event)
        if isinstance(event, Retired):
            self._trace.retire(event.chain, event.reason)
        elif isinstance(event, Lost):
            self._progress.lost(event)

    def _check_step(self, block: DrawBlock) -> None:
        """Log, once a chain, that its step is too large for the curvature it has met.

        The first time in a run it is a warning too: it need not be paid for to its end.
        """
        if CURVATURE not in block.values or block.chain in self._too_large:
            return
        curvature = np.asarray(block.values[CURVATURE], np.float64)
        step = bias.steepness(curvature, self._spec.facts)
        if step is None or not step.too_large:
            return
        if not (self._too_large or self._spec.pilot):
            said = f"{step}, in a new run; this one goes on (chain {block.chain})"
            warnings.warn(said, StepTooLargeWarning, stacklevel=2)
        self._too_large.add(block.chain)
        self._trace.log(StepTooLarge(block.chain, str(step), step.gentle_lr))

    def _check_anchor(self) -> None:
        """Refuse to sample where w* has no loss, or hopping would cause too large an error."""
        at_anchor = self._at_anchor
        if at_anchor is not None:
            reason = _not_finite(at_anchor) or hop.refusal(at_anchor.hop_bias, self._spec)
            if reason is not None:
                self._events.append(Refused(reason))

    def _commit(self) -> None:
        self._last_commit = time.monotonic()
        if self._pending:
            self._trace.commit(self._pending)
            self._commit_took = time.monotonic() - self._last_commit
            self._pending.clear()
            self._events.append(Committed(self._trace.committed))

    def _restart(self) -> None:
        """Start the places again whose time has come."""
        now = time.monotonic()
        for place, (when, incarnation) in list(self._restarts.items()):
            if when > now:
                continue
            del self._restarts[place]
            self._incarnations[place] = incarnation
            try:
                self._pool.start(self._spec, [place])
            except DistsamplerError as error:
                self._events.append(PlaceLost(place, str(error), "fatal", incarnation))


def _not_finite(at_anchor: AtAnchor) -> str | None:
    """Why no excess over the loss at w* can be computed; None if it can."""
    losses = at_anchor.losses
    if losses is not None and not np.isfinite(losses).all():
        bad = np.flatnonzero(~np.isfinite(losses))
        first = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
        got = f"{len(bad)} of {len(losses)} examples give {losses[bad[0]]} (rows {first})"
    elif not np.isfinite([at_anchor.init_loss, *at_anchor.probe_losses]).all():
        got = f"its mean over all data is {at_anchor.init_loss}"
    else:
        return None
    return (
        f"the loss at w* must be finite on every example, but {got}: leave such examples out or "
        "mend them (a sequence of which no token counts gives nan), or give a model whose loss is "
        "finite there"
    )
