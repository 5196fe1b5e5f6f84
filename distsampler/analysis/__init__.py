"""From a store to numbers, without torch and Ray: how far they can be trusted, and what they are.

In reading order: ``run``, what a run directory says; ``estimators``, the LLC and the WBIC;
``verdict``, whether to trust them; ``advice``, what to do if not; ``diagnosis``, have the chains
converged; ``convergence``, R-hat, ESS and MCSE of each quantity; ``drift``, by means over segments
of draws; ``error_budget``, what an LLC's error is made of; ``bias``, what a sampler's step can be
expected to add; ``heatmap``, the LLC over lr and nbeta; ``inference_data``, the draws as xarray,
read when they are used; ``arviz_bridge``, what is taken from ArviZ; ``json_values``, results as
JSON.
"""
