"""params.yaml for a container: as it is, but for where keys lie."""

import yaml

from pipelines.params import Params

KEYS = "/etc/headrace/keys"


def settings(params: Params) -> str:
    """The text of the file."""
    values = params.model_dump(mode="json", by_alias=True)
    if params.serve.keys is not None:
        values["serve"] |= {"keys": KEYS}
    return yaml.safe_dump(values, sort_keys=False)
