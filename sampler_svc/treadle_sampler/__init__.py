"""The sampler service: continuous batching of many adapters over one base, behind treadle.v1.SamplingService.

It holds no durable state: revisions are fetched from the adapter store on demand and cached.
"""
