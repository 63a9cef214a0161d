"""WikiText's tokens back to prose, and its words and bytes counted before that, as the harness's own task does it."""

from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["process_results", "wikitext_detokenizer"]
