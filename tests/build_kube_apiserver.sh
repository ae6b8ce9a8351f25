#!/bin/bash
# Builds kube-apiserver from Debian's source package into the folder given, for the tests of the controller: no package
# brings the program. Needs root (apt-get), 3 GB of disk meanwhile and 5 to 10 minutes; run it once.
set -euo pipefail

target=$(realpath -m "$1")
work=$target/work
[ -x "$target/kube-apiserver" ] && exit 0
mkdir -p "$work"/{apt,lists/partial,home,go/src/k8s.io}

# Source packages are read from a copy of the machine's list, which stays as it is.
for file in /etc/apt/sources.list.d/*.sources; do
	sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/apt/$(basename "$file")"
done
sources=(-o "Dir::Etc::SourceParts=$work/apt" -o Dir::Etc::SourceList=/dev/null -o "Dir::State::Lists=$work/lists")
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends golang-1.19-go golang-github-modern-go-reflect2-dev dpkg-dev etcd-server
apt-get "${sources[@]}" update -qq
cd "$work"
apt-get "${sources[@]}" source -qq --download-only kubernetes
tree=$work/go/src/k8s.io/kubernetes
[ -d "$tree" ] || dpkg-source --no-check -x kubernetes_*.dsc "$tree"

# GOPATH mode: the package's vendored modules have no list that module mode accepts.
export GOPATH=$work/go HOME=$work/home PATH=/usr/lib/go-1.19/bin:$PATH CGO_ENABLED=0 GO111MODULE=off GOPROXY=off
cd "$tree"
# The vendored reflect2 crashes when it was built by Go 1.18 or newer; Debian's own package has a later one.
rm -rf vendor/github.com/modern-go/reflect2
cp -rL /usr/share/gocode/src/github.com/modern-go/reflect2 vendor/github.com/modern-go/
rm -f vendor/github.com/modern-go/reflect2/*_test.go

# The package leaves out the generated OpenAPI definitions, which server-side apply needs.
go build -o "$HOME/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
inputs=$(grep -rl '+k8s:openapi-gen=' --include='*.go' pkg cmd vendor/k8s.io/ staging/src/k8s.io | xargs -n1 dirname |
	sed -e 's#^staging/src/#vendor/#' -e 's#^#k8s.io/kubernetes/#' | sort -u |
	grep -vE 'sample-|code-generator|/test|testdata' | paste -sd,)
"$HOME/openapi-gen" -O zz_generated.openapi -h hack/boilerplate/boilerplate.generatego.txt -i "$inputs" \
	-p k8s.io/kubernetes/pkg/generated/openapi --report-filename "$HOME/violations" -o "$GOPATH/src"

version=v$(dpkg-parsechangelog -S Version | sed 's/[+-].*//')
kube=k8s.io/kubernetes/vendor/k8s.io
flags="-s -w -X $kube/component-base/version.gitVersion=$version -X $kube/client-go/pkg/version.gitVersion=$version"
go build -trimpath -ldflags "$flags" -o "$target/kube-apiserver" ./cmd/kube-apiserver
cd "$target"
ln -sf "$(command -v etcd)" etcd
chmod -R u+w "$work"
rm -rf "$work"
