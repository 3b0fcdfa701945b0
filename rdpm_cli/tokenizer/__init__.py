"""Images <-> codes: autoencoder, noise schedule, T-step noisy residual quantiser, losses and training."""
