"""What is done to a model: ``replace``, ``restore`` and ``fuse``.

- ``convert``      replace and restore, and the report
- ``recognize``    what norm a module of an unknown class computes, of those in ``forms``; ``norm_acts`` with its activation
- ``fusing``       fuse, and its plan for a model
- ``rewritten``    a module's forward, compiled anew from its source (``sources``): sums and norms, heads and rotary
  embeddings (``heads_source``, ``rotary``), norms and activations (``activations_source``) become one call each
- ``residuals``, ``heads_fused``, ``activations_fused``   what such a forward calls, by what ``norm_calls`` says of a norm
- ``made``         the classes that modules get, and how they are copied and pickled
"""
