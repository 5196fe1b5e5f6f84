"""The components of a transformer by the names of the field, and the entries that belong to each.

``l0`` a layer; ``l0.attn`` its attention; ``l0h3`` a head: its rows of q with their bias, its
columns of o, and its rows of k and v where no other head shares them; ``l0g1`` a key-value group:
its k and v, and its heads; ``l0.mlp``; ``l0e2`` an expert; ``l0.router``; ``l0.shared`` the experts
that every token passes; ``l0.norm``; ``l0.lora``, ``lora`` low-rank adapters; ``embed`` tokens and
learned positions; ``unembed``; ``full``; ``other`` what no component has, as a final norm.

``architectures``  where transformers have their parts: a table
``structure``      a model matched against it
``attention``      heads and groups of heads in an attention's parameters
``regions``        entries of parameters
``listing``        the components of a model, by name: ``components(model)``
"""
