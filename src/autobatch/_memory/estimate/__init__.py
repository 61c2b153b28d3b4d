"""Memory of a training step, predicted without running it.

The step runs on fake tensors at batch sizes 2, 3 and 5, with the operators that CUDA would choose.
Every allocation becomes a polynomial of the batch size, so that the events of any size are known;
a replay of torch's caching allocator turns them into allocated and reserved bytes.
"""
