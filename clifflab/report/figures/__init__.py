"""Figures: each function draws one panel from tables that the study wrote and returns a matplotlib ``Figure``."""

from clifflab.report.figures.ablation import dose_response as dose_response
from clifflab.report.figures.controls import levels_figure as levels_figure
from clifflab.report.figures.controls import reliability_diagram as reliability_diagram
from clifflab.report.figures.controls import truncation_curve as truncation_curve
from clifflab.report.figures.curves import curves as curves
from clifflab.report.figures.curves import layer_map as layer_map
from clifflab.report.figures.distributions import cliff_histograms as cliff_histograms
from clifflab.report.figures.distributions import closing_drops as closing_drops
from clifflab.report.figures.heads import head_map as head_map
from clifflab.report.figures.heads import joint_curve as joint_curve
from clifflab.report.figures.heads import rank_scatter as rank_scatter
from clifflab.report.figures.outcomes import outcome_bars as outcome_bars
from clifflab.report.figures.probes import auroc_by_layer as auroc_by_layer
from clifflab.report.figures.repair import before_after as before_after
from clifflab.report.figures.repair import choice_bars as choice_bars
from clifflab.report.figures.repair import learning_curve as learning_curve
from clifflab.report.figures.repair import score_histogram as score_histogram
