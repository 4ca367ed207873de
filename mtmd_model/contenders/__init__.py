"""The models that MTMD is measured against: only `architectures` imports them, and MTMD trains without them."""
