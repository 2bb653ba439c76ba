"""The parts of the latent loop, one small module each; they meet in :mod:`slr_core.model.reasoner`."""
