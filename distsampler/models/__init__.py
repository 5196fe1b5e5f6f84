"""Models: the user's model and loss, as a chain uses them.

``loss``         the user's loss function: what it returns, and in which precision it is called
``copies``       which models can be copied, and copies that share nothing with theirs
``inspection``   what model and loss do, seen on a few rows (``calls``, ``loss_values``, ``reach``)
``components``   the parts of a transformer by name: heads, layers, experts, embeddings
``restriction``  which parameters, and which of their entries, move
``sampler``      from the config's name and options to an optimizer, and what is known of it
``numerics``     the settings of torch that a chain's bits depend on
``replica``      the recipe of a chain, ``ChainSpec``, and the copy of the model made of it
``stack``        the loss of several chains at once, and its gradient
"""
