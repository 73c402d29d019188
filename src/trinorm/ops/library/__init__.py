"""The registered ops: what torch.compile, torch.export and DTensor see of the norms."""
