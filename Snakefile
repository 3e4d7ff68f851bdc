"""Teacher in, smaller student out: the stages, in their order."""

from snakemake.utils import min_version

min_version("9.0")


# A file given by --configfile is whole and takes the place of params.yaml: merged with it, a preset
# would gain its stages.
if not workflow.overwrite_configfiles:

    configfile: "params.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/check.smk"
include: "workflow/rules/teacher.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/distill.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/track.smk"


rule all:
    default_target: True
    input:
        CHECKED_FIRST,
        ROOMS,
        rules.report.output,
        TRACKED.values(),
