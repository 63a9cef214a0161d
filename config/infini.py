# Infini-Pythia: layer 0 is one memory, written by the delta rule.
model = "infini"
