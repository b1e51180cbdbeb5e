package probe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// write is a file of the sandbox with one line.
func (c *inside) write(path, text string) {
	_ = os.MkdirAll(filepath.Dir(path), 0o755)
	_ = os.WriteFile(path, []byte(text+"\n"), 0o644)
}

// appended adds a line to a file that is there.
func appended(path, text string) {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, _ = f.WriteString(text + "\n")
		f.Close()
	}
}

// read looks for secrets in files.
func (c *inside) read(paths ...string) {
	for _, p := range paths {
		if f, err := os.Open(p); err == nil {
			raw, _ := io.ReadAll(io.LimitReader(f, 256<<10))
			f.Close()
			c.found(raw)
		}
	}
}

// homes are where the home of the host, and that of the sandbox, may be.
func (c *inside) homes() []string {
	all := []string{c.Home}
	if h := os.Getenv("HOME"); h != "" && h != c.Home {
		all = append(all, h)
	}
	return all
}

func (c *inside) readHome(name string) {
	for _, h := range c.homes() {
		c.read(filepath.Join(h, name))
	}
}

// unix sends the token to a socket of the file system, or, with @, an abstract
// one.
func (c *inside) unix(path, token string) {
	nc, err := net.DialTimeout("unix", path, tryLimit)
	if err != nil {
		return
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(tryLimit))
	exchange(nc, get("socket", "/"+token))
}

// fromEnv sends the token to the sockets that variables name.
func (c *inside) fromEnv(token string, paths []string, names ...string) {
	for _, n := range names {
		if v := os.Getenv(n); v != "" {
			v = strings.TrimPrefix(strings.TrimPrefix(v, "unix://"), "unix:path=")
			paths = append(paths, v)
		}
	}
	for _, p := range paths {
		c.unix(p, token)
	}
}

func (c *inside) run1(dir string) string { return filepath.Join(filepath.Dir(c.Home), "run", dir) }

func otherGate(home string) string {
	return filepath.Join(filepath.Dir(home), "run", "bottle", "other-00000000", "gate.sock")
}

// bait lays a secret into a file below the laboratory's folder.
func baitIn(path string, format string) func(l *lab, token string) error {
	return func(l *lab, token string) error {
		return l.lay(filepath.Join(l.dir, path), fmt.Sprintf(format, l.secret(token)))
	}
}

// stolen is a probe for a secret that is laid out at a path of the laboratory.
func stolen(id, name, title, path, format string, try func(c *inside, token string)) *probe {
	return &probe{Info: info(id, name, "", title), lay: baitIn(path, format), try: try, leak: func(l *lab, token string) string { return l.stolen(token) }}
}

// hidden is a probe for a file of the workspace that the sandbox has to hide.
func hidden(p *probe) *probe {
	p.skip = func(l *lab) string {
		if l.o.Plain {
			return "it takes a file to hide in the workspace, which --plain leaves out"
		}
		return ""
	}
	return p
}

func hostProbes() []*probe {
	return []*probe{
		{Info: info("S01", "abstract-socket", "", "an abstract unix socket of the host"), try: func(c *inside, token string) { c.unix("@"+c.Abstract, token) }},
		{Info: info("S02", "docker-socket", "", "a unix socket of the host's file system, such as docker.sock"), try: func(c *inside, token string) {
			c.fromEnv(token, []string{c.run1("docker.sock")}, "DOCKER_HOST")
		}},
		{Info: info("S03", "environment", "", "a secret of the environment that the sandbox was started with"),
			try: func(c *inside, token string) {
				c.found([]byte(strings.Join(os.Environ(), "\n")))
				all, _ := filepath.Glob("/proc/[0-9]*/environ")
				c.read(all...)
			}, leak: func(l *lab, token string) string { return l.stolen(token) }},
		stolen("S04", "ssh-key", "~/.ssh/id_ed25519", "home/.ssh/id_ed25519", "-----BEGIN NOTHING-----\n%s\n", func(c *inside, _ string) { c.readHome(".ssh/id_ed25519") }),
		stolen("S05", "aws-credentials", "~/.aws/credentials", "home/.aws/credentials", "[default]\naws_secret_access_key = %s\n", func(c *inside, _ string) { c.readHome(".aws/credentials") }),
		hidden(stolen("S06", "dotenv", "a .env in the workspace", "ws/.env", "API_KEY=%s\n", func(c *inside, _ string) { c.read(filepath.Join(c.Workspace, ".env")) })),
		{Info: info("S07", "ca-key", "", "the private key of an authority that clients in the sandbox trust"), lay: layAuthority, try: findKeys,
			leak: func(l *lab, token string) string { return l.proven(token) }},
		{Info: info("S08", "shell-startup", "", "appending to ~/.bashrc of the host"), try: func(c *inside, token string) {
			appended(filepath.Join(c.Home, ".bashrc"), token)
		}, leak: func(l *lab, token string) string { return l.contains(filepath.Join(l.dir, "home/.bashrc"), token) }},
		{Info: info("S11", "symlink-write", "C03", "writing through a symlink that leads out of the workspace"), try: func(c *inside, token string) {
			link := filepath.Join(c.Workspace, "link-"+token)
			_ = os.Symlink(c.Outside, link)
			c.write(filepath.Join(link, "through-"+token), token)
			c.write(filepath.Join(c.Workspace, "../outside/dots-"+token), token)
		}, leak: func(l *lab, token string) string {
			for _, name := range []string{"through-", "dots-"} {
				if s := l.contains(filepath.Join(l.dir, "outside", name+token), token); s != "" {
					return s
				}
			}
			return ""
		}},
		{Info: info("S12", "host-process", "", "seeing and signalling a process of the host"), try: func(c *inside, token string) {
			for _, pid := range pids() {
				raw, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
				if strings.Contains(string(raw), roleWitness) {
					c.found(raw)
					_ = syscall.Kill(pid, syscall.SIGUSR1)
				}
			}
		}, leak: func(l *lab, token string) string {
			if s := l.stolen(token); s != "" {
				return s
			}
			return l.sighting(token, nil)
		}},
		{Info: info("S13", "manifest", "C03", "changing the file that says what the sandbox may do"), skip: func(l *lab) string {
			if len(l.protected) == 0 {
				return "the workspace holds no such file (bottle.json)"
			}
			return ""
		}, try: func(c *inside, token string) {
			path := filepath.Join(c.Workspace, manifestName)
			raw, _ := os.ReadFile(path)
			appended(path, "// "+token)
			c.write(path, string(raw)+"// "+token)
			c.write(path+"."+token, string(raw)+"// "+token)
			_ = os.Rename(path+"."+token, path)
			_ = os.Link(path, path+".link")
			appended(path+".link", "// "+token)
			_ = os.Rename(path, path+".away")
			if os.Remove(path) == nil {
				c.write(path, string(raw)+"// "+token)
			}
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
				c.write(path, string(raw)+"// "+token)
			}
		}, leak: func(l *lab, _ string) string { return l.changed() }},
		{Info: info("S14", "agent-sockets", "", "the ssh-agent's and the D-Bus socket"), try: func(c *inside, token string) {
			c.fromEnv(token, []string{c.run1("agent.sock"), c.run1("bus")}, "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS")
		}},
		stolen("S15", "roads-out", "a file of the host by way of /proc, links and handles", "outside/secret.txt", "%s\n", func(c *inside, token string) {
			secret := filepath.Join(c.Outside, "secret.txt")
			paths := []string{secret, "/proc/self/root" + secret, filepath.Join(c.Workspace, "../outside/secret.txt")}
			for _, pid := range pids() {
				p := filepath.Join("/proc", strconv.Itoa(pid))
				paths = append(paths, p+"/root"+secret, p+"/cwd/../outside/secret.txt")
			}
			link := filepath.Join(c.Workspace, "secret-"+token)
			_ = os.Symlink(secret, link)
			hard := filepath.Join(c.Workspace, "hard-"+token)
			_ = os.Link(secret, hard)
			c.read(append(paths, link, hard)...)
			chrooted(c, secret)
			byHandle(c)
		}),
		{Info: info("S16", "hard-link", "C03", "writing to a file of the host by a hard link in the workspace"), lay: baitIn("outside/linked.txt", "%s\n"), try: func(c *inside, token string) {
			name := filepath.Join(c.Workspace, "linked-"+token)
			if os.Link(filepath.Join(c.Outside, "linked.txt"), name) == nil {
				appended(name, token)
			}
		}, leak: func(l *lab, token string) string {
			return l.contains(filepath.Join(l.dir, "outside/linked.txt"), token)
		}},
		{Info: info("S17", "device-node", "C03", "leaving a device in the workspace"), try: func(c *inside, token string) {
			_ = unix.Mknod(filepath.Join(c.Workspace, "device-"+token), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 8)))
		}, leak: func(l *lab, token string) string {
			if fi, err := os.Lstat(l.ws("device-" + token)); err == nil && fi.Mode()&os.ModeDevice != 0 {
				return "the workspace holds a device: " + fi.Mode().String()
			}
			return ""
		}},
		{Info: info("S18", "host-name", "", "changing the host's name"), try: func(c *inside, token string) { _ = unix.Sethostname([]byte(token)) }, leak: func(_ *lab, token string) string {
			if name, _ := os.Hostname(); name == token {
				return "the host is called " + token + " now"
			}
			return ""
		}},
		stolen("S19", "shell-history", "~/.bash_history, ~/.netrc, ~/.git-credentials, ~/.docker/config.json", "home/.netrc", "machine example.com password %s\n", func(c *inside, _ string) {
			for _, n := range []string{".bash_history", ".netrc", ".git-credentials", ".docker/config.json"} {
				c.readHome(n)
			}
		}),
		stolen("S20", "other-workspace", "the state of another sandbox", "home/.local/state/bottle/bottles/other-00000000/record.json", "{\"x\":%q}\n", func(c *inside, _ string) {
			c.readHome(".local/state/bottle/bottles/other-00000000/record.json")
		}),
		{Info: info("S21", "shared-memory", "", "System V shared memory of the host"), lay: layMemory, try: readMemory, leak: func(l *lab, token string) string { return l.stolen(token) }},
		{Info: info("S22", "tmp-file", "", "a file in the host's temporary folder"), lay: func(l *lab, token string) error {
			return l.lay(filepath.Join(l.dir, "tmp-bait"), l.secret(token))
		}, try: func(c *inside, _ string) {
			all, _ := filepath.Glob(filepath.Join(os.TempDir(), "bp-*", "tmp-bait"))
			c.read(append(all, filepath.Join(filepath.Dir(c.Home), "tmp-bait"))...)
		}, leak: func(l *lab, token string) string { return l.stolen(token) }},
	}
}

func pids() []int {
	entries, _ := os.ReadDir("/proc")
	var all []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			all = append(all, pid)
		}
	}
	return all
}

// chrooted looks from the root of process 1, for those who may.
func chrooted(c *inside, secret string) {
	fd, err := unix.Open("/proc/1/root", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	f, err := unix.Openat(fd, strings.TrimPrefix(secret, "/"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	file := os.NewFile(uintptr(f), secret)
	defer file.Close()
	raw, _ := io.ReadAll(io.LimitReader(file, 4096))
	c.found(raw)
}

// byHandle opens the parent of the workspace by its file handle, which does not
// go by names.
func byHandle(c *inside) {
	mount, err := unix.Open(c.Workspace, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(mount)
	h, _, err := unix.NameToHandleAt(mount, "", unix.AT_EMPTY_PATH)
	if err != nil || h.Size() < 8 {
		return
	}
	// Inodes near the workspace's own: its siblings were made together with it.
	raw := h.Bytes()
	own := native.Uint32(raw)
	for d := -16; d <= 16; d++ {
		for gen := range 1 {
			b := append([]byte(nil), raw...)
			native.PutUint32(b, uint32(int(own)+d))
			native.PutUint32(b[4:], uint32(gen))
			fd, err := unix.OpenByHandleAt(mount, unix.NewFileHandle(h.Type(), b), unix.O_RDONLY|unix.O_CLOEXEC)
			if err != nil {
				continue
			}
			f := os.NewFile(uintptr(fd), "handle")
			text, _ := io.ReadAll(io.LimitReader(f, 4096))
			f.Close()
			c.found(text)
		}
	}
}

const memoryKey = 0x626f7470

// layMemory puts a secret into shared memory of the host.
func layMemory(l *lab, token string) error {
	id, err := unix.SysvShmGet(memoryKey, 4096, unix.IPC_CREAT|0o666)
	if err != nil {
		return nil // a kernel without it has nothing to leak
	}
	b, err := unix.SysvShmAttach(id, 0, 0)
	if err != nil {
		return err
	}
	copy(b, l.secret(token))
	return unix.SysvShmDetach(b)
}

func readMemory(c *inside, _ string) {
	id, err := unix.SysvShmGet(memoryKey, 4096, 0)
	if err != nil {
		return
	}
	b, err := unix.SysvShmAttach(id, 0, unix.SHM_RDONLY)
	if err != nil {
		return
	}
	c.found(b)
	_ = unix.SysvShmDetach(b)
}

// layAuthority gives the host a proxy's authority: its certificate where clients
// look for such, its key where such proxies keep it.
func layAuthority(l *lab, _ string) error {
	m, err := newMaterial("proxy.invalid")
	if err != nil {
		return err
	}
	dir := filepath.Join(l.dir, "home/.config/canary-proxy")
	if err := l.lay(filepath.Join(dir, "ca.pem"), string(m.pem())); err != nil {
		return err
	}
	l.baitCA = filepath.Join(dir, "ca.pem")
	return l.lay(filepath.Join(dir, "ca-key.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: m.Key})))
}

// findKeys looks for certificates of authorities and for private keys of any
// of them, and proves to have one by a signature.
func findKeys(c *inside, token string) {
	var certs []*x509.Certificate
	var keys []crypto.Signer
	look := func(path string) {
		f, err := os.Open(path)
		if err != nil {
			return
		}
		raw, _ := io.ReadAll(io.LimitReader(f, 1<<20))
		f.Close()
		for {
			var block *pem.Block
			if block, raw = pem.Decode(raw); block == nil {
				return
			}
			if cert, err := x509.ParseCertificate(block.Bytes); err == nil && cert.IsCA {
				certs = append(certs, cert)
			} else if key := privateKey(block.Bytes); key != nil {
				keys = append(keys, key)
			}
		}
	}
	roots := append(c.homes(), "/tmp", "/run", "/var/lib", "/etc/ssl", "/etc/pki", "/opt", "/usr/local/share/ca-certificates", "/.bottle")
	for _, name := range []string{"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO"} {
		if v := os.Getenv(name); v != "" {
			look(v)
			roots = append(roots, filepath.Dir(v))
		}
	}
	left := 5000
	for _, root := range roots {
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if left--; left < 0 {
				return fs.SkipAll
			}
			if err == nil && d.Type().IsRegular() && (strings.Contains(path, "key") || strings.HasSuffix(path, ".pem") || strings.HasSuffix(path, ".crt")) {
				look(path)
			}
			return nil
		})
	}
	sum := sha256.Sum256([]byte(token))
	for _, key := range keys {
		for _, cert := range certs {
			pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
			if !ok || !pub.Equal(cert.PublicKey) {
				continue
			}
			if sig, err := key.Sign(rand.Reader, sum[:], crypto.SHA256); err == nil {
				c.say(word{Proof: &proof{Cert: cert.Raw, Signature: sig}})
				return
			}
		}
	}
}

func privateKey(der []byte) crypto.Signer {
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k
	}
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		if s, ok := k.(crypto.Signer); ok {
			return s
		}
	}
	return nil
}

// holds checks a proof: the signature is by the key of the certificate, which is
// an authority's.
func (p *proof) holds(token string) (subject string, ok bool) {
	cert, err := x509.ParseCertificate(p.Cert)
	if err != nil || !cert.IsCA {
		return "", false
	}
	sum := sha256.Sum256([]byte(token))
	switch key := cert.PublicKey.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(key, sum[:], p.Signature)
	case *rsa.PublicKey:
		ok = rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], p.Signature) == nil
	case ed25519.PublicKey:
		ok = ed25519.Verify(key, sum[:], p.Signature)
	}
	return cert.Subject.String(), ok
}

// manifestName is the file that says what a bottle may do.
const manifestName = "bottle.json"
