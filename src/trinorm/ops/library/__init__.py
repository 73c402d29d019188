"""The registered ops, ``torch.ops.trinorm.*``: what torch.compile, torch.export and DTensor see of the norms."""
