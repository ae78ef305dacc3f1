"""The lightning indexer: score compressed entries against a query and pick the best."""

from kernels.index_topk.reference import index_scores, select_topk
from kernels.index_topk.streamed import best_visible, index_topk, tile_scores

__all__ = ["best_visible", "index_scores", "index_topk", "select_topk", "tile_scores"]
