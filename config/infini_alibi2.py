# Infini-Pythia whose memory fades twice as fast as ALiBi's slopes have it.
model = "infini"
use_alibi = True
alibi_scale = 2.0
