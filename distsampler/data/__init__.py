"""Data: numbered examples, and which of them a chain takes at which step.

``kinds``    what a user may give as data, made to rows
``rows``     numbered examples, and the batch of some of them
``batches``  the rows of a minibatch, as a function of chain and step
``shards``   data cut into shards, of which a process holds one at a time
``tokens``   which tokens of a batch count
``token_rows``  token ids in memory or in a file, as rows
``trees``    batches as tensors in tuples, lists, mappings and dataclasses
"""
