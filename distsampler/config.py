"""What a run is: four frozen models. Unknown keys are refused, with the nearest known one named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from distsampler.errors import ConfigError, unknown_name
from distsampler.references import Mask, Named, patterns_or_masks

NUMBER = "number"  # of what may be a number or "auto"
HOP_EVERY = 100  # steps, where not given
AUTO_GATE = {"every": 400, "relative_error": 0.05}  # with draws="auto", where not given
_AUTO = Discriminator(lambda value: "auto" if value == "auto" else NUMBER)
_Auto = Annotated[Literal["auto"], Tag("auto")]
_MaskField = Annotated[Mask, PlainValidator(Mask.of), PlainSerializer(str)]

_NamedField = Annotated[Named, PlainValidator(Named.of), PlainSerializer(str)]


class Frozen(BaseModel):
    """A value that cannot be changed and knows all its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replaced(self, **changes: Any) -> Self:  # noqa: ANN401 (its fields)
        """Return a copy with other values, validated; fields not set so far remain not set."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**given | changes)


class Config(Frozen):
    """Part of a config: its errors are sentences."""

    model_config = ConfigDict(allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __init__(self, **data: object) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                lines = [_sentence(type(self), detail) for detail in error.errors()]
                raise ConfigError("\n".join(lines)) from None


class SamplerConfig(Config):
    """A sampler by name, and its options.

    Options are declared once, in the signature of the sampler's class; they are checked against it
    before anything starts.

    Args:
        name: a name of ``distsampler.optim.SAMPLERS``, or ``"package.module:Class"``.
        correct_heat: inject less noise where minibatches bring some (SGLD, LMSGLD, RMSPropSGLD):
            the run measures the gradients' variance at w* and hands it to the sampler.
        **options: any option of that class, for example ``lr``, ``localization``, ``nbeta``.
            Left out, ``nbeta`` means n / log n, ``freeze_after`` the end of burn-in, ``batch_size``
            that of the run.

    Example:
        >>> SamplerConfig(name="sgld", lr=1e-4, localization=100.0).options
        {'lr': 0.0001, 'localization': 100.0}
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)

    name: str = "sgld"
    correct_heat: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options of the sampler's class, as given."""
        return dict(self.model_extra or {})


class GateConfig(Config):
    """When a run counts as converged.

    Args:
        rhat: upper bound of the rank-normalised split R-hat of every gated variable, and of the
            nested R-hat where starts are dispersed.
        ess: lower bound of their bulk and tail effective sample size.
        every: draws after burn-in until the gate first looks; the following looks are spaced
            geometrically (a factor 1.5), and the run stops at the first that says converged.
            None: all draws are made, and the verdict is given at the end; with draws="auto": 400.
        relative_error: standard error of the LLC over its value that is wanted; None: any; with
            draws="auto": 0.05.
    """

    rhat: Annotated[float, Field(gt=1.0)] = 1.01
    ess: Annotated[float, Field(gt=0)] = 400.0
    every: Annotated[int, Field(ge=1)] | None = None
    relative_error: Annotated[float, Field(gt=0)] | None = None


class PlacementConfig(Config):
    """Where chains run. Nothing here changes a bit of the trace.

    Args:
        gpus_per_chain: GPUs of each chain, fractions allowed; None: 1 where the cluster has GPUs,
            else 0.
        cpus_per_chain: CPUs of each chain.
        chains_per_actor: chains that share one process, one after another; a pack is never parted.
        address: the Ray cluster to join; None: RAY_ADDRESS, or a running local Ray, or a new one.
        label_selector: Ray node labels an actor needs.
        runtime_env: Ray runtime environment of the actors; local folders of ``working_dir`` and
            ``py_modules`` are sent to the cluster when it is joined.
        autoscale: the cluster starts nodes for what actors ask: an actor that no node can hold now
            is waited for up to ``start_timeout``, not refused. Needs ``gpus_per_chain``.
        start_timeout: seconds an actor may take to come up.
        answer_timeout: seconds an actor may take to say that it lives, once it has long reported
            nothing; then it is taken for lost.
        block: draws a chain makes between two reports; None: sized to take about two seconds, more
            where over 200 places report.
    """

    gpus_per_chain: Annotated[float, Field(ge=0)] | None = None
    cpus_per_chain: Annotated[float, Field(ge=0)] = 1.0
    chains_per_actor: Annotated[int, Field(ge=1)] = 1
    address: str | None = None
    label_selector: dict[str, str] | None = None
    runtime_env: dict[str, Any] | None = None
    autoscale: bool = False
    start_timeout: Annotated[float, Field(gt=0)] = 300.0
    answer_timeout: Annotated[float, Field(gt=0)] = 60.0
    block: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _asks_for_what_is_not_there(self) -> PlacementConfig:
        if self.autoscale and self.gpus_per_chain is None:
            raise ValueError(
                "autoscale needs gpus_per_chain, for example 1, or 0 for CPUs only: what nodes "
                "that are not there yet will have is not known"
            )
        return self


class RunConfig(Config):
    """Everything a run depends on but model, data and loss.

    Args:
        sampler: the sampler and its options.
        chains: how many.
        draws: kept draws of a chain after burn-in: the budget, if the gate stops early. "auto":
            until the gate says converged and the wanted error is reached, at most ``max_draws``.
        max_draws: the budget of draws="auto".
        burn_in: draws before those; stored in the warm-up groups, never in the posterior. "auto":
            as many as the trace drifts, at most half (``drift.settled``), chosen anew at each look
            of the gate; ``draws`` then counts them too. The default with draws="auto".
        thin: steps a draw.
        batch_size: examples a step.
        batches: minibatches drawn with replacement, or as one permutation an epoch.
        data_mode: "replicate": every chain draws its batches from all data. "hop": the data are cut
            into shards, and a chain draws from one for ``hop_every`` steps, then from another.
            "pinned", each chain on its shard for ever, is refused with the bias it would bring.
        shards: how many, of data_mode="hop"; not needed where the data are given as a list of them.
        hop_every: steps of a chain on a shard; 100 with data_mode="hop".
        seed: chain c is a function of (seed, c).
        restrict_to: names or regular expressions of the parameters that move, or boolean masks by
            name (tensors, arrays or nested lists; True moves, a parameter not named does not);
            None: all that require a gradient.
        init: where chains start: all at w* ("anchor"), or the odd ones away from it ("dispersed"),
            so that the two kinds come to the LLC from both sides; see ``dispersion``.
        init_radius: |w - w*| of the odd chains' start, in weight units; None: found by the loss.
        mode: the model's mode while sampling. Where an example's loss depends on chance or on its
            batch (dropout, batch norm in mode "train"), each draw costs a pass over its batch more,
            at w*.
        probe: examples of the fixed evaluation subset that the gate reads.
        observables: your own, by name: ``fn(model, batch)`` on the probe at every draw, a tensor of
            one shape; in YAML "module:callable" or "path/to/file.py:callable". Those of up to 64
            numbers go to the posterior, larger ones to ``Run.wide``.
        save_losses: keep the probe's per-example losses at every draw: ``Run.losses``.
        save_weights_every: keep the parameters that move at every so-manieth draw, counted from the
            chain's start: ``Run.weights``.
        device: where a chain runs; "auto": the GPU it was given, else the CPU.
        threads: CPU threads of a chain.
        deterministic: ask torch for deterministic algorithms.
        precision: "bf16": the model's forward and backward pass under autocast, at w* too. Weights,
            noise and curvature stay as they are.
        compile: ``torch.compile`` the loss, or the recorded gradients of a pack.
        microbatch: examples that go through the model at once, where a batch takes too much memory;
            its gradient is the sum of theirs. In mode "train" batch norm sees one of them.
        watch: measure the curvature along each chain, at a start and then ever more rarely, and
            predict the bias of its steps from it.
        min_chains: with fewer left, the run fails.
        max_seconds: stop cleanly after so much wall-clock time.
        gate: when the run counts as converged.
        placement: where the chains run.
        commit_seconds: seconds between two commits; more where a commit takes over half a second.
        fsync: make each commit survive a power loss, not only the death of any process.
        max_state_mb: larger states of chains (in MB) go from the actor to the store directly.
        divergence_factor: a chain is retired when nbeta times the excess loss on the probe exceeds
            so many times d/2, what a regular model of d parameters has; None: never for that.
        pack: chains that advance together, their gradients in one call: for models so small that a
            step is mostly overhead. Another number gives the same law, and other last bits. "auto":
            the fastest, measured when the run starts.

    Example:
        >>> RunConfig(chains=2, sampler=SamplerConfig(lr=1e-4)).sampler.options
        {'lr': 0.0001}
    """

    sampler: SamplerConfig = SamplerConfig()
    chains: Annotated[int, Field(ge=1)] = 4
    draws: Annotated[Annotated[int, Field(ge=1), Tag(NUMBER)] | _Auto, _AUTO] = 1000
    max_draws: Annotated[int, Field(ge=1)] | None = None
    burn_in: Annotated[Annotated[int, Field(ge=0), Tag(NUMBER)] | _Auto, _AUTO] = 200
    thin: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 64
    batches: Literal["replacement", "epoch"] = "replacement"
    data_mode: Literal["replicate", "hop", "pinned"] = "replicate"
    shards: Annotated[int, Field(ge=1)] | None = None
    hop_every: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    restrict_to: tuple[str, ...] | dict[str, _MaskField] | None = None
    init: Literal["anchor", "dispersed"] = "anchor"
    init_radius: Annotated[float, Field(gt=0)] | None = None
    mode: Literal["eval", "train"] = "eval"
    probe: Annotated[int, Field(ge=8)] = 256
    observables: dict[str, _NamedField] = {}
    save_losses: bool = False
    save_weights_every: Annotated[int, Field(ge=1)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] = 1
    deterministic: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    microbatch: Annotated[int, Field(ge=1)] | None = None
    watch: bool = True
    min_chains: Annotated[int, Field(ge=1)] = 2
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    gate: GateConfig = GateConfig()
    placement: PlacementConfig = PlacementConfig()
    commit_seconds: Annotated[float, Field(gt=0)] = 5.0
    fsync: bool = False
    max_state_mb: Annotated[float, Field(ge=0)] = 64.0
    divergence_factor: Annotated[float, Field(gt=1)] | None = 100.0
    pack: Annotated[Annotated[int, Field(ge=1), Tag(NUMBER)] | _Auto, _AUTO] = 1

    @field_validator("restrict_to", mode="before")
    @classmethod
    def _patterns_or_masks(cls, value: object) -> object:
        return patterns_or_masks(value)

    @model_validator(mode="before")
    @classmethod
    def _few_chains(cls, data: object) -> object:
        """One chain is allowed (its verdict will be UNDETERMINED): min_chains follows it down."""
        if isinstance(data, dict) and data.get("chains") == 1:
            return {"min_chains": 1, **data}
        return data

    @model_validator(mode="before")
    @classmethod
    def _until_converged(cls, data: object) -> object:
        """What draws="auto" needs and was not given, written down: a run does what it says."""
        if not (isinstance(data, dict) and data.get("draws") == "auto"):
            return data
        gate = data.get("gate", {})
        given = gate.model_dump() if isinstance(gate, GateConfig) else gate
        if isinstance(given, dict):
            given = {**AUTO_GATE, **{k: v for k, v in given.items() if v is not None}}
        return {"burn_in": "auto", **data, "gate": given}

    @model_validator(mode="before")
    @classmethod
    def _hops(cls, data: object) -> object:
        """How long a visit lasts, written down."""
        if isinstance(data, dict) and data.get("data_mode") == "hop" and not data.get("hop_every"):
            return {**data, "hop_every": HOP_EVERY}
        return data

    @model_validator(mode="after")
    def _hops_or_not(self) -> RunConfig:
        given = [name for name in ("shards", "hop_every") if getattr(self, name) is not None]
        if self.data_mode == "replicate" and given:
            raise ValueError(f"{given[0]} belongs to data_mode='hop', and it is 'replicate'")
        if self.data_mode == "hop" and self.batches == "epoch":
            raise ValueError(
                "batches='epoch' walks through all data, and data_mode='hop' sits on one shard: "
                "use batches='replacement'"
            )
        if self.data_mode == "hop" and self.sampler.correct_heat:
            raise ValueError(
                "sampler.correct_heat needs batches from all data at w*, and data_mode='hop' holds "
                "one shard at a time: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _chains_cover_minimum(self) -> RunConfig:
        if self.min_chains > self.chains:
            raise ValueError(f"min_chains must be at most chains={self.chains}: {self.min_chains}")
        return self

    @model_validator(mode="after")
    def _budget_is_known(self) -> RunConfig:
        if self.draws == "auto" and self.max_draws is None:
            raise ValueError(
                "draws='auto' needs max_draws, the most draws that a chain may make: for example "
                "max_draws=20000"
            )
        if self.draws != "auto" and self.max_draws is not None:
            raise ValueError(
                f"max_draws is the budget of draws='auto', and draws is {self.draws}: leave out "
                "one of them"
            )
        return self

    @model_validator(mode="after")
    def _odd_chains_start_somewhere(self) -> RunConfig:
        if self.init == "dispersed" and self.chains < 2:
            raise ValueError(
                f"init='dispersed' needs at least 2 chains, got {self.chains}: the odd ones start "
                "away from w*"
            )
        if self.init != "dispersed" and self.init_radius is not None:
            raise ValueError(
                f"init_radius={self.init_radius:g} belongs to init='dispersed', and init is "
                f"{self.init!r}: set that, or leave it out"
            )
        return self

    @property
    def together(self) -> int:
        """Chains of a pack; 1 while "auto" has not been settled."""
        return 1 if self.pack == "auto" else min(self.pack, self.chains)

    @property
    def packs(self) -> tuple[range, ...]:
        """The chains of each pack; the last may have fewer."""
        size = self.together
        return tuple(
            range(first, min(first + size, self.chains)) for first in range(0, self.chains, size)
        )


def _sentence(model: type[BaseModel], detail: ErrorDetails) -> str:
    """A pydantic error as: where, what must hold, what was got."""
    where = ".".join(str(part) for part in detail["loc"] if part != NUMBER)
    if detail["type"] == "extra_forbidden":
        return unknown_name("option", where, model.model_fields)
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # of a model inside this one
        return f"{where}: {cause}"
    message = detail["msg"].removeprefix("Value error, ")
    if not where:
        return message
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"
