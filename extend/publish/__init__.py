"""Publish an adapter, a model or results on the Hub, with a card made from the manifests."""

from extend.publish.publish import Publication, check_destination, publish

__all__ = ["Publication", "check_destination", "publish"]
