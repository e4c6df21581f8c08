"""The documented path of the pipeline for diffusers: `from hsivi_fast.diffusers import HSIVIPipeline`.

Exported folders name this module in model_index.json, so its path must not change. The code is in export/pipeline.py.
"""

# ModelMixin and SchedulerMixin stand here too: diffusers looks up a component's base class in the component's module.
from .export.pipeline import HSIVINetwork, HSIVIPipeline, HSIVIScheduler, ModelMixin, SchedulerMixin

__all__ = ["HSIVINetwork", "HSIVIPipeline", "HSIVIScheduler", "ModelMixin", "SchedulerMixin"]
