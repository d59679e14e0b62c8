"Installs grpo_chess; every value comes from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

TOP = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(TOP / "settings.ini", encoding="utf-8")
values = cfg["DEFAULT"]


def words(key):
    "A value of settings.ini as a list."
    return values.get(key, "").split()


def text(name):
    "A file of the top folder; empty where there is none, as in an editable install of a part."
    return (TOP / name).read_text(encoding="utf-8") if (TOP / name).exists() else ""


extras = {name: words(f"{name}_requirements") for name in ("wandb", "notebooks", "docs")}
extras["dev"] = words("dev_requirements") + [package for needed in extras.values() for package in needed]
extras["ray"] = words("ray_requirements")  # large, and for few: not part of dev

# No address is better than one that leads nowhere.
urls = {} if values["user"] == "OWNER" else {"Source": values["git_url"], "Issues": f"{values['git_url']}/issues"}

setup(
    name=values["lib_name"],
    version=values["version"],
    description=values["description"],
    long_description=text("README.md"),
    long_description_content_type="text/markdown",
    license="GPL-3.0-or-later",
    license_files=["LICENSE"],
    author=values["author"],
    project_urls=urls,
    keywords=values["keywords"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Topic :: Games/Entertainment :: Board Games",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {version}" for version in ("3", "3.11", "3.12", "3.13")),
    ],
    python_requires=f">={values['min_python']}",
    packages=find_packages(include=["grpo_chess", "grpo_chess.*"]),
    package_data={"grpo_chess": ["py.typed", "configs/*.yaml", "weights/*.safetensors", "weights/*.md", "web/*"]},
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": words("console_scripts")},
    zip_safe=False,
)
