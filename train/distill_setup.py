"""What a distillation trains with: the base model with students and teachers on it."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate import Accelerator

from stepfuse.fuse.backbones.fingerprint import check_path
from stepfuse.fuse.backbones.loading import load_base
from stepfuse.fuse.lora.mixture import Network
from stepfuse.fuse.lora.safe_files import WEIGHTS
from stepfuse.fuse.rules.merged_product import MergedProduct
from stepfuse.fuse.rules.product import Product
from stepfuse.fuse.sets.adapter import load_adapter
from stepfuse.fuse.sets.adapter_set import AdapterSet
from stepfuse.train.distill_settings import DistillSettings
from stepfuse.train.fused_sampling import Sampling
from stepfuse.train.init_set import add_adapter_of_set
from stepfuse.train.provenance import provenance
from stepfuse.train.setup import ModelSetup, network_dtype, policy_of, zero3

TEACHER = "teacher:"  # before the name of an adapter of the set on the network; no objective's name has a colon


class DistillSetup(ModelSetup):
    """What stays the same in a distillation: the base model, with every adapter of the set on it twice.

    The students, under the adapters' names, are trained; the teachers are not. Both have the adapters' variance
    schedules, which are not trained: with b of `soup_weights` the students' Gaussian and the teachers' product differ
    in one place,

        m_soup - m* = (Σ_j u_j k_j) (e(Σ b_i B_i A_i) - Σ b_i e_i),     v_soup = v*

    so that the student is to predict Σ b_i e_i, whatever the schedules are, and a schedule has nothing to make up for.
    At a vertex that is the teacher. Schedules u_i for the rule `soup`, whose variance is Σ w_i u_i, could not reach
    v* = 1 / Σ (w_i / v_i) at mixtures and v_i at vertices, unless all v_i are equal; then both rules are the same.

    Args:
        settings: with what the set decides.

    Attributes:
        adapter_set: the set, read and checked.
        teachers: how the product is sampled.

    Raises:
        ValueError: for kinds of LoRA that cannot be merged or batched, and a set whose steps have no noise.
    """

    settings: DistillSettings

    def __init__(
        self, settings: DistillSettings, accelerator: Accelerator, prompts: Sequence[str], adapter_set: AdapterSet
    ) -> None:
        super().__init__(settings, accelerator, prompts, load_base(adapter_set.base, dtype=network_dtype(accelerator)))
        self.adapter_set, self.base = adapter_set, adapter_set.base
        check_path(adapter_set.base, self.backbone.path(self.backbone.default_shape))
        for adapter in adapter_set.adapters:
            add_adapter_of_set(self.backbone, adapter)
            load_adapter(self.backbone, adapter, adapter_set.base, name=TEACHER + adapter.name)
        self.backbone.network.requires_grad_(False)
        schedules = [objective.variance for objective in adapter_set.objectives]
        frozen = [TEACHER + name for name in adapter_set.names]
        policy = policy_of(self.backbone, settings, schedules, row_modules=zero3(accelerator), frozen=frozen)
        self.make_engine(policy, schedules, MergedProduct())
        experts = [replace(each, network=Network.of(TEACHER + each.name)) for each in self.sampling.objectives]
        self.teachers: Sampling = replace(self.sampling, objectives=tuple(experts), rule=Product())
        weights = {f"{settings.adapter_set}/{a.folder.name}/{WEIGHTS}": a.sha256 for a in adapter_set.adapters}
        self.record |= provenance(settings, weights)
