"""The docs site: docs/*.md with what is generated from the code put in, built by zensical."""
