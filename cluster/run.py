"""One run to its end: in this process, or over many workers."""

from importlib.util import find_spec

from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.progress import Progress, StopAsked
from pipeline.report import Report
from pipeline.run import run as run_pipeline


def run_anywhere(settings: RunConfig, progress: Progress, stop_asked: StopAsked) -> Report:
    """Run in this process, or over a cluster where the settings have one."""
    if settings.cluster is None:
        return run_pipeline(settings, progress, stop_asked, probe=True)
    if find_spec("ray") is None:
        raise ConfigError(
            "the settings have a `cluster` section, but ray is not installed; "
            "pip install 'secateur[cluster]', or remove the section to run in this process"
        )
    from cluster.job import run_on_cluster

    return run_on_cluster(settings, progress, stop_asked)
