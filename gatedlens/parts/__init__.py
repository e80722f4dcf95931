"""The parts that stand beside a recurrence in a layer, each once, for every architecture that has them.

    attention.py    softmax attention: grouped heads, a window or none, rotary, norms of q and k, a gate
    unseen.py       the same where nobody looks at scores and pattern: they are never held
    indexed_attention.py  attention that chooses by an indexer which tokens it attends to
    copies.py       what reads and writes a stream of several copies (hyper-connections)
    ngrams.py       hashed embeddings of n-grams, added to the stream
    glu.py          channel mixers: gated (up times an activation), and plain
    experts.py      a mixture of experts: router, weights, every expert's output, the shared expert
    activation.py   activations by the names that configs give them, with their words in equations
    stream_norm.py  a norm of the residual stream itself, as a branch
    positioned.py   a language model that counts positions through its states, as rotary attention needs it

A part gives its rows (axes, equations, source) as data, and knows no architecture.
"""
