from gatedlens.loading.named import (
    BUNDLED,
    HubOption,
    Model,
    bundled_models,
    from_pretrained,
    skeleton,
    supported,
    wrap,
)

__all__ = ["BUNDLED", "HubOption", "Model", "bundled_models", "from_pretrained", "skeleton", "supported", "wrap"]
