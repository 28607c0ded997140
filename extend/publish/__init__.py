"""Publish an adapter, a model or results on the Hub, with a card made from the manifests."""

from extend.publish.publish import Publication, publish

__all__ = ["Publication", "publish"]
