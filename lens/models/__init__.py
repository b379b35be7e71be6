"""Models: a frozen base as one stack, and the two sides around it that are trained.

The suffix of a tensor's name is its shape, a letter for each axis:

    B  rows of a batch                        V  vocabulary
    T  tokens that run through a model        D  width of the residual stream
    S  tokens or cache slots looked at        F  width of an MLP
    P  positions of a document that are read  L  blocks
    Q  rows of a prompt                       M  maps of a decoder
    N  rows of a flat batch: activations,     K  key/value heads
       explanations; in experts, tokens       G  query heads that share one of K
    E  experts, C chosen by a token           h  width of a head, i its rotated pairs
    A  (token, choice) pairs of experts       R  rotary tables
    W  width of a table that words are        I, O  inputs and outputs of any matrix
       read from, that of the encoder

N = B·P activations; with a group of explanations for each, N = B·P·group.
"""
