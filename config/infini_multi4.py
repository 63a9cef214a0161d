# Infini-Pythia with four memories, written in turn and read by their relevance to each query.
model = "infini"
segment_len = 32
num_memories = 4
