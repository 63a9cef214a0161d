# Phase 1 of the cascade: two ContextBlocks of 500, each on its own half of the training tokens. Then cascade_phase2.py.
# One block or four, or of 1,000: --num_context_blocks=1 --context_dim=1000 --out_dir=out/cascade_1 here, and there the
# same numbers, an --out_dir of its own and --init_from=out/cascade_1.
# Needs GPT-2's tokens: python prep.py --tokenizer=gpt2. Without a hub: --dataset=mini --embeddings=out/pythia
model = "cascade"
phase = "phase1"
dataset = "mini-gpt2"
embeddings = "gpt2"
num_tokens = 100_000
max_iterations = 100
convergence_threshold = 0.03
learning_rate = 0.003
batch_size = 5_000
gradient_clip = 2.0
context_noise = 0.05
early_stopping_threshold = 0.9
