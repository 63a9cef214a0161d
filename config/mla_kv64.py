# MLA-Pythia with a latent of 64 per layer in place of the 1,024 numbers of key and value.
model = "mla"
kv_dim = 64
