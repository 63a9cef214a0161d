# Infini-Pythia whose memory fades by exp(-slope) with every segment, ALiBi's slopes.
model = "infini"
segment_len = 32
use_alibi = True
