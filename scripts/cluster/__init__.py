"""``check``: the files of cluster/, read without a cluster; ``simulate``: a cluster in numbers."""
