# Infini-Pythia with eight memories, written in turn and read by their relevance to each query.
model = "infini"
num_memories = 8
