"""The benchmarks of scripts/bench, one a file; a ``*_worker`` is the process that one measures.

``beside_models``  what devinterp 2 and distsampler are raced on, in both environments
``machine``        where and when a benchmark was run
``race``           contestants in processes of their own, which take turns; the peer's environment
``workloads``      models, data and losses that are raced
"""
