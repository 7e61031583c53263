"""The model side of Treadle: frozen bases, LoRA adapters, packed training passes and decoding.

It needs torch and knows nothing of gRPC, tenants, journals or the network.
"""
