"""A study's stages, in the order of the data."""

from clifflab.stages.ablated import AblatedStep
from clifflab.stages.ablation import AblationStep
from clifflab.stages.base import CORPUS
from clifflab.stages.base import Context as Context
from clifflab.stages.base import Identities as Identities
from clifflab.stages.base import Layout as Layout
from clifflab.stages.base import Step as Step
from clifflab.stages.base import Unit as Unit
from clifflab.stages.capture import CaptureStep
from clifflab.stages.cliff import CliffStep
from clifflab.stages.controls import ControlsStep
from clifflab.stages.corpus import CorpusStep
from clifflab.stages.corpus_cliff import CorpusCliffStep
from clifflab.stages.curve import CurveStep
from clifflab.stages.duplicates import DuplicatesStep
from clifflab.stages.evaluate import EvaluateStep
from clifflab.stages.guard import GuardStep
from clifflab.stages.head_estimates import HeadEstimatesStep
from clifflab.stages.head_sets import HeadSetsStep
from clifflab.stages.heads import HeadsStep
from clifflab.stages.judge import JudgeStep
from clifflab.stages.probe import ProbeStep
from clifflab.stages.prompts import PromptsStep
from clifflab.stages.report import ReportStep
from clifflab.stages.select import SelectStep
from clifflab.stages.traces import TracesStep
from clifflab.stages.truncation import TruncationStep
from clifflab.stages.tune import TuneStep

_ORDER = (
    PromptsStep(),
    DuplicatesStep(),
    TracesStep(),
    JudgeStep(),
    GuardStep(),
    CaptureStep(),
    ProbeStep(),
    ControlsStep(),
    CliffStep(),
    TruncationStep(),
    HeadEstimatesStep(),
    HeadsStep(),
    HeadSetsStep(),
    AblatedStep(),
    AblationStep(),
    CorpusStep(),
    TracesStep(CORPUS),
    JudgeStep(CORPUS),
    GuardStep(CORPUS),
    CorpusCliffStep(),
    SelectStep(),
    TuneStep(),
    CurveStep(),
    EvaluateStep(),
    ReportStep(),
)
STEPS: dict[str, Step] = {step.name: step for step in _ORDER}
