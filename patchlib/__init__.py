"""patchlib"""
