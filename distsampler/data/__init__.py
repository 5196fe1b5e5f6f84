"""Data: numbered examples, and which of them a chain takes at which step.

``rows``     numbered examples from whatever a user gives as data, and the batch of some of them
``batches``  the rows of a minibatch, as a function of chain and step
``shards``   data cut into shards, of which a process holds one at a time
``trees``    batches as tuples, lists and dicts of tensors
"""
