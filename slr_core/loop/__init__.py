"""The parts of the latent loop, one module each; :mod:`slr_core.model.looped` combines them."""
