"""Chains: how draws are made, and what is measured at them.

In reading order: ``steps``, the loop in which chains make their draws; ``chain``, one chain;
``pack``, chains that advance together; ``observables``, what is measured at a draw; ``probe``, the
fixed examples of which it is; ``user_observables``, a user's own; ``anchor_pass``, what is measured
once at w*; ``hop``, chains that hop over shards: their correction, and the bias that remains;
``dispersed_start``, where odd chains may start; ``sampler_trial``, a sampler tried before a run;
``state``, a chain as bytes; ``worker``, what a place does when it is given work.
"""
