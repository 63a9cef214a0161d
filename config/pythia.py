# The baseline: Pythia-70M, 6,144 cached numbers per token.
model = "pythia"
