# Infini-Pythia with four memories, written in turn and read by their relevance to each query.
model = "infini"
num_memories = 4
