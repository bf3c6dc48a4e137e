"""How adapters meet a model: find the modules, stand layers at them, choose who runs, fold in, take away."""

from gossamer.attachment.merge import Group, merge, merge_groups, unmerge
from gossamer.attachment.report import InjectionReport, SiteRow
from gossamer.attachment.starting import eva, loftq
from gossamer.attachment.verbs import (
    active,
    attach,
    attached,
    capture,
    detach,
    neutral_values,
    sites_of_parameters,
    trainable_parameters,
    use,
    using,
    using_spans,
)
from gossamer.attachment.walk import base_fingerprint

__all__ = [
    "Group",
    "InjectionReport",
    "SiteRow",
    "active",
    "attach",
    "attached",
    "base_fingerprint",
    "capture",
    "detach",
    "eva",
    "loftq",
    "merge",
    "merge_groups",
    "neutral_values",
    "sites_of_parameters",
    "trainable_parameters",
    "unmerge",
    "use",
    "using",
    "using_spans",
]
