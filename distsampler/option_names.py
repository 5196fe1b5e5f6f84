"""What an option is called here, for who knows it by another name or looks in another place.

Names are those of devinterp, PyMC, Stan, NumPyro, TensorFlow Probability, BlackJAX and posteriors.
"""

from collections.abc import Collection, Mapping

from distsampler.errors import unknown_name

# Part of a config -> its class; "" is the run's.
HOMES = {
    "": "RunConfig",
    "sampler": "SamplerConfig",
    "gate": "GateConfig",
    "placement": "PlacementConfig",
}
# Options of the samplers' classes, which are declared in their signatures; tests hold them equal.
SAMPLER_OPTIONS = (
    *("lr", "nbeta", "localization", "noise_level", "weight_decay", "friction", "preconditioner"),
    *("diffusion_factor", "scheme", "beta1", "beta2", "stability", "freeze_after"),
    *("initial_scale", "bias_correction"),
    *("gradient_variance", "bounding_box_size", "optimize_over", "save_noise", "save_mala_vars"),
    *("noise_norm", "grad_norm", "weight_norm", "distance"),
)
# Argument of sample() -> where it stands on the command line.
ARGUMENTS = {
    "model": "a line of the YAML",
    "data": "a line of the YAML",
    "loss": "a line of the YAML",
    "probes": "a block of the YAML",
    "store": "--store",
    "resume": "--resume",
    "pool": "the options of placement",
    "quiet": "nothing: it is for Python",
    "log": "nothing: it is for Python",
}

# Name here, names elsewhere, and what differs in meaning.
_ROWS = (
    ("draws", "num_draws n_draws ndraws num_samples n_samples samples num_results nsteps", ""),
    ("draws", "iter_sampling num_samples_per_chain", ""),
    ("chains", "num_chains n_chains nchains nwalkers", ""),
    (
        "burn_in",
        "num_burnin_steps num_burnin burnin burnin_steps num_warmup num_warmup_steps warmup "
        "warmup_steps n_warmup iter_warmup tune n_tune discard",
        "counted in draws, of thin steps each",
    ),
    ("thin", "num_steps_bw_draws num_steps_between_results thinning steps_per_draw thin_by", ""),
    ("batch_size", "bs batchsize minibatch_size train_batch_size", ""),
    ("batches", "shuffle replacement replace", "'replacement' or 'epoch'"),
    (
        "microbatch",
        "grad_accum_steps gradient_accumulation_steps",
        "examples at once; batch_size counts those of all parts together",
    ),
    ("seed", "random_seed random_state rng rng_key rng_seed", ""),
    ("observables", "callbacks callback observable", ""),
    ("restrict_to", "optimize_over_per_model_param params parameters", ""),
    ("precision", "use_amp amp autocast", "'bf16' runs the model under autocast"),
    ("max_seconds", "max_time time_limit", ""),
    ("sampler.name", "sampling_method optimizer kernel algorithm", ""),
    ("sampler", "sampling_method_kwargs optimizer_kwargs", ""),
    (
        "sampler.lr",
        "learning_rate learn_rate step_size stepsize epsilon eps eta",
        "the variance of a step's noise: dw = -(lr/2) grad U + sqrt(lr) N(0, 1)",
    ),
    ("sampler.localization", "elasticity gamma", "the gamma of gamma/2 |w - w*|^2"),
    (
        "sampler.nbeta",
        "temperature temp",
        "n / T for n examples and a posterior exp(-n L / T); n / log n where it is left out",
    ),
    (
        "sampler.nbeta",
        "beta inverse_temperature",
        "n times beta for n examples; n / log n where it is left out",
    ),
    ("sampler.stability", "rmsprop_eps", ""),
    ("sampler.beta2", "rmsprop_alpha", ""),
    ("sampler.noise_level", "noise noise_scale", ""),
    ("sampler.friction", "momentum momentum_decay alpha", "of the sampler 'sghmc'"),
    ("sampler.bounding_box_size", "bounding_box box_size", ""),
    ("gate.rhat", "r_hat rhat_max max_rhat rhat_threshold", ""),
    ("gate.ess", "min_ess ess_min n_eff target_ess", ""),
    ("gate.relative_error", "rel_error tolerance tol rtol", ""),
    ("placement.gpus_per_chain", "num_gpus n_gpus gpus", ""),
    ("placement.gpus_per_chain", "device_ids gpu_idxs", "Ray gives every chain its GPU"),
    ("placement.cpus_per_chain", "num_cpus n_cpus cpus", ""),
    (
        "placement.cpus_per_chain",
        "cores num_workers n_jobs parallel_chains",
        "every chain has a process of its own where the cluster has room",
    ),
    ("placement.address", "ray_address cluster", ""),
)
OTHER_NAMES = {name: (ours, remark) for ours, names, remark in _ROWS for name in names.split()}

_N = "n is the number of examples of the data"
_QUIET = "quiet=True of sample() hides the progress"
_LENGTH = "a chain makes (burn_in + draws) * thin steps"
# Name elsewhere, or part.name where it means something else there -> why there is no such option.
NEEDLESS = {
    "init_loss": "the loss at w* is measured over all data when a run starts",
    "online": "every draw is stored, and can be read while the run goes on",
    **dict.fromkeys(("num_examples", "sampler.num_samples", "sampler.n"), _N),
    **dict.fromkeys(("verbose", "progressbar", "progress_bar"), _QUIET),
    **dict.fromkeys(("epochs", "num_epochs", "num_steps"), _LENGTH),
}


def unknown_option(
    name: str, part: str, known: Mapping[str, Collection[str]], what: str = "option"
) -> str:
    """Return a sentence for an option that a part of a config does not have.

    Args:
        name: the option.
        part: "" or "sampler", "gate", "placement".
        known: part -> the names of its options.
        what: what it was meant to be.
    """
    asked = f"unknown {what} {name!r}"
    plain = name.lower().replace("-", "_")
    if why := NEEDLESS.get(f"{part}.{plain}", NEEDLESS.get(plain)):
        return f"{asked}: leave it out: {why}"
    if not part and plain in ARGUMENTS:
        return f"{asked}: it is an argument of sample() itself; for a YAML, {ARGUMENTS[plain]}"
    ours, remark = OTHER_NAMES.get(plain, ("", ""))
    home, _, option = ours.rpartition(".")
    if option in known[home]:
        meaning = f" ({remark})" if remark else ""
        return f"{asked}: did you mean {_written(home, option, part)}?{meaning}"
    homes = [home for home in known if home != part and plain in known[home]]
    if homes:
        return f"{asked}: did you mean {_written(homes[0], plain, part)}?"
    return unknown_name(what, name, known[part])


def _written(home: str, option: str, part: str) -> str:
    """How an option is written, as seen from a part."""
    if home == part:
        return repr(option)
    path = f"{home}.{option}" if home else option
    return f"{HOMES[home]}({option}=...), in YAML {path}"
