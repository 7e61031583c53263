"""The front door: who is calling, may they, and which worker has what they ask for; then it forwards bytes.

Holds no durable state and no tensors, so that any number of gateways can serve one deployment. Knows nothing of
what is inside an operation, a prompt or an adapter file.
"""
