"""potstill: knowledge distillation for PyTorch.

The public names are imported when first used, so that ``import potstill`` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from potstill._version import __version__ as __version__

if TYPE_CHECKING:
    from potstill.checks.run import preflight as preflight
    from potstill.distillation import AttentionDistillation as AttentionDistillation
    from potstill.distillation import DistillationConfig as DistillationConfig
    from potstill.distillation import FeatureDistillation as FeatureDistillation
    from potstill.distillation import ProgressiveDistillation as ProgressiveDistillation
    from potstill.distiller import Distiller as Distiller
    from potstill.distiller_models import StudentConfig as StudentConfig
    from potstill.distiller_models import StudentModel as StudentModel
    from potstill.distiller_models import TeacherConfig as TeacherConfig
    from potstill.distiller_models import TeacherModel as TeacherModel
    from potstill.knowledge.capture import capture as capture
    from potstill.losses.objective import Objective as Objective
    from potstill.losses.objective import Term as Term
    from potstill.losses.ramps import Ramp as Ramp
    from potstill.models.sklearn_models import SklearnTeacher as SklearnTeacher
    from potstill.multi_task import MultiTaskDistiller as MultiTaskDistiller
    from potstill.recipe.load import load_recipe as load_recipe
    from potstill.recipe.schema import Recipe as Recipe
    from potstill.runs.steps import Run as Run
    from potstill.teachers.cached import Cached as Cached
    from potstill.teachers.live import Live as Live
    from potstill.training.module import DistillationModule as DistillationModule
    from potstill.training.trainer import DistillationTrainer as DistillationTrainer

_PUBLIC = {
    "AttentionDistillation": "potstill.distillation",
    "Cached": "potstill.teachers.cached",
    "DistillationConfig": "potstill.distillation",
    "Distiller": "potstill.distiller",
    "FeatureDistillation": "potstill.distillation",
    "MultiTaskDistiller": "potstill.multi_task",
    "ProgressiveDistillation": "potstill.distillation",
    "StudentConfig": "potstill.distiller_models",
    "StudentModel": "potstill.distiller_models",
    "TeacherConfig": "potstill.distiller_models",
    "TeacherModel": "potstill.distiller_models",
    "DistillationModule": "potstill.training.module",
    "DistillationTrainer": "potstill.training.trainer",
    "Live": "potstill.teachers.live",
    "Objective": "potstill.losses.objective",
    "Ramp": "potstill.losses.ramps",
    "Recipe": "potstill.recipe.schema",
    "Run": "potstill.runs.steps",
    "SklearnTeacher": "potstill.models.sklearn_models",
    "Term": "potstill.losses.objective",
    "capture": "potstill.knowledge.capture",
    "load_recipe": "potstill.recipe.load",
    "preflight": "potstill.checks.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'potstill' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, "__version__"])
