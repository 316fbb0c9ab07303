"""SpecForge: train speculative-decoding drafts, measure the acceptance length they earn, export them.

Tensors are named with their shapes in docstrings. Letters used throughout: N tokens of a packed batch, L
tokens of a document, R query rows, M supervised tokens (labels), T steps of the training-time test or students
of a label, H hidden size, A width of the captured layers, V vocabulary, D draft vocabulary, h/k query and
key heads, d head size, γ (gamma) tokens drafted a round, τ (tau) acceptance length.
"""

__version__ = "0.1.0"
